"""Programs made to be forked; run them from the root of the repository, as `python -m examples.<name>`."""
