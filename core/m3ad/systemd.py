"""Notifications for a systemd that started this process with Type=notify (sd_notify(3))."""

import os
import socket


def tell_systemd(state: str) -> None:
    """Send a notification such as READY=1; nothing happens where no systemd listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
        except OSError:
            return
