"""Microbenchmarks of flowattn: run `python -m flowattn.bench`; README.md beside this file says how they measure."""
