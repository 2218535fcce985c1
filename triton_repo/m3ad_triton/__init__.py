"""m3ad Triton: repository writer and linter, CPU stage models, local server; command `m3ad-triton`."""
