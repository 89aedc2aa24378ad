"""A switch in a process of its own that loses frames at random: not every kernel has `netem`.

It reads the names of network namespaces from its standard input, plugs each in as `eth0`, and says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import random
import select
import struct
import sys
from typing import Final

_NEW_NETWORK: Final = 0x40000000  # CLONE_NEWNET
_SET_INTERFACE: Final = 0x400454CA  # TUNSETIFF
_TAP_OF_FRAMES_ALONE: Final = 0x0002 | 0x1000  # IFF_TAP, IFF_NO_PI
_ADDRESS_BYTES: Final = 6
_MOST_FRAME_BYTES: Final = 65_536


def plugged(namespace: str) -> int:
    """Make the card of a namespace, and return the descriptor of its other end."""
    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)
    card = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(card, _SET_INTERFACE, struct.pack("16sH22x", b"eth0", _TAP_OF_FRAMES_ALONE))
    return card


def main() -> None:
    lost, chance = float(sys.argv[1]), random.Random(int(sys.argv[2]))
    cards, places = list[int](), dict[bytes, int]()
    while True:
        ready, _, _ = select.select([sys.stdin.fileno(), *cards], [], [])
        for card in ready:
            if card == sys.stdin.fileno():
                if not (line := sys.stdin.readline()):
                    return
                cards.append(plugged(line.strip()))
                print("plugged", flush=True)
                continue
            frame = os.read(card, _MOST_FRAME_BYTES)
            to, source = frame[:_ADDRESS_BYTES], frame[_ADDRESS_BYTES : 2 * _ADDRESS_BYTES]
            places[source] = card
            if chance.random() < lost:
                continue
            for other in [places[to]] if to in places else [each for each in cards if each != card]:
                with contextlib.suppress(OSError):  # a card that is not up yet
                    os.write(other, frame)


if __name__ == "__main__":
    main()
