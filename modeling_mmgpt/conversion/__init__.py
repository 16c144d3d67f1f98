"""What [`modeling_mmgpt.converting_mmgpt`] needs: old files, old names, and what of a model can be read off both."""
