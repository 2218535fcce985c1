"""m3ad core: the contract, frames, preprocessing, bundles, metrics and the in-process pipeline."""
