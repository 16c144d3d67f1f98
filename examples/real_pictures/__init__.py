"""Cut-out photographs before many backgrounds, and questions about them: a small world that no program draws.

`stamps.json` names 421 of the cut-outs of Tux Paint (short name, kind, and 40 that are held out), `photos.json` 139
photographs of GCompris. The pictures themselves are not here: `python -m examples.real_pictures.make_data --help` says
which Debian packages bring them, and what form another folder needs.
"""
