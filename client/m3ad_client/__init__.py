"""m3ad client: inspect, evaluate and measure; command `m3ad-client`."""
