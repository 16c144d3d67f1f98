"""Parts of [`modeling_mmgpt.converting_mmgpt`]: old files, old names, and the sizes of a model that they tell."""
