"""Closed doors on ZeroMQ sockets: CURVE encrypts and proves keys, ZAP (pyzmq's authenticator) asks the allow-list.

Every listener of a transport with keys is a CURVE server, every channel a CURVE client that knows its server's
public key. What a peer is called then ends with its key, so that nobody above can take one peer's word for another's,
whatever routing identity it chooses, and nobody below is asked twice.
"""

from __future__ import annotations

import ipaddress

import zmq

from paramserver.protocol.keys import KEY_CHARACTERS, Keys
from paramserver.protocol.transport import Peer, TransportError

Options = dict[int, int | bytes]
ZAP_DOMAIN = b"paramserver"


class Guard:
    """Lets in who is listed, for all listeners of one context. Has a thread of its own, idle but for handshakes."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        self._allowed = keys.allowed
        self.listener_options: Options = {
            zmq.CURVE_SERVER: 1,
            zmq.CURVE_SECRETKEY: keys.own.secret.encode(),
            zmq.ZAP_DOMAIN: ZAP_DOMAIN,
            zmq.ZAP_ENFORCE_DOMAIN: 1,  # without an answer of the authenticator nobody comes in
        }
        from zmq.auth.thread import ThreadAuthenticator  # brings asyncio, which a process without keys does not need

        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), self)

    def callback(self, domain: str, key: bytes) -> bool:
        """The authenticator's question, in its thread: may this key connect?"""
        return self._allowed.lets_in(key.decode("ascii"))

    def lets_speak(self, peer: Peer) -> bool:
        """Whether the peer's key is still listed."""
        return self._allowed.lets_speak(key_of(peer))

    def close(self) -> None:
        """Before the context is terminated."""
        self._authenticator.stop()


def name_with_key(identity: zmq.Frame) -> Peer:
    """The peer of a routing identity that came through a CURVE listener."""
    key = identity.get("User-Id")  # what the authenticator answered: the key in Z85
    assert isinstance(key, str), "ZAP names every peer that it lets in"
    return identity.bytes + key.encode("ascii")


def routing_identity(peer: Peer) -> bytes:
    return peer[:-KEY_CHARACTERS]


def key_of(peer: Peer) -> str:
    return peer[-KEY_CHARACTERS:].decode("ascii")


def channel_options(keys: Keys | None, server_key: str, address: str) -> Options:
    """What a channel must be told before it connects. Raises TransportError where a key is missing on one side."""
    if keys is None and not server_key:
        return {}
    if keys is None:
        raise TransportError(
            f"{address} takes only processes with keys, and this one has none; start it with --keys DIR"
        )
    if not server_key:
        raise TransportError(
            f"the public key of {address} is not known, so that anybody could answer there; start it with --keys DIR "
            "as well, or this process without"
        )
    return {
        zmq.CURVE_SERVERKEY: server_key.encode(),
        zmq.CURVE_PUBLICKEY: keys.own.public.encode(),
        zmq.CURVE_SECRETKEY: keys.own.secret.encode(),
    }


def check_exposed(interface: str, address: str) -> None:
    """Raise TransportError where a listener without keys would be open to the network."""
    if not ipaddress.ip_address(interface).is_loopback:
        raise TransportError(
            f"cannot listen on {address!r}: without keys everybody on the network could read and change the model; "
            "make some with `paramserver keygen` and give --keys DIR, or bind 127.0.0.1; --insecure leaves it open"
        )
