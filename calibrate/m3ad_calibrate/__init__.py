"""m3ad calibrate: verdict threshold, precision plans and rig plane; command `m3ad-calibrate`."""
