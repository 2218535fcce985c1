"""What a machine with a GPU can prove of m3ad in twenty minutes: `m3ad-plugins gpu`, or `make gpu` in a checkout."""
