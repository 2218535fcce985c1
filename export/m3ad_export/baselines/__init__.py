"""What a frame rate is measured against, in plain eager PyTorch; `python -m m3ad_export.baselines` serves one."""
