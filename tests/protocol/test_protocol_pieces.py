"""Files in pieces arrive whole, whatever is lost, repeated, or begun anew."""

from __future__ import annotations

import random

import pytest

from paramserver.protocol import pieces
from paramserver.protocol.pieces import AGAIN_SECONDS, Download, Incoming, Upload


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 7)


@pytest.mark.parametrize("seed", range(20))
def test_an_upload_arrives_whole_over_a_line_that_loses_and_repeats(seed: int) -> None:
    chance, now = random.Random(seed), 0.0
    data = bytes(chance.randrange(256) for _ in range(chance.randint(1, 100)))
    upload, incoming, received = Upload(data), Incoming(), bytearray()
    for _ in range(2000):
        if upload.is_complete:
            break
        now += 0.5
        piece = upload.due(now)
        if piece is None:
            continue
        for _ in range(chance.choice([0, 1, 1, 2])):
            if incoming.takes(piece[0], upload.total, len(piece[1])):
                received += piece[1]
            if chance.random() < 0.8:
                upload.heard(incoming.stored)
    assert incoming.is_complete
    assert bytes(received) == data


@pytest.mark.parametrize("seed", range(20))
def test_a_download_arrives_whole_over_a_line_that_loses_and_repeats(seed: int) -> None:
    chance, now = random.Random(seed), 0.0
    data = bytes(chance.randrange(256) for _ in range(chance.randint(0, 100)))
    download = Download()
    for _ in range(2000):
        if download.is_complete:
            break
        now += 0.5
        offset = download.due(now)
        if offset is None:
            continue
        for _ in range(chance.choice([0, 1, 1, 2])):
            download.heard(offset, len(data), memoryview(data)[offset : offset + 7])
    assert bytes(download.data) == data


def test_one_piece_is_on_its_way_and_is_sent_again_without_an_answer() -> None:
    upload = Upload(bytes(20))
    assert upload.due(0.0) is not None
    assert upload.due(AGAIN_SECONDS - 0.1) is None
    again = upload.due(AGAIN_SECONDS)
    assert again is not None
    assert again[0] == 0
    upload.heard(7)
    following = upload.due(AGAIN_SECONDS)
    assert following is not None
    assert following[0] == 7, "an answer makes the next one due"


def test_a_receiver_that_came_back_with_less_gets_the_rest_again() -> None:
    upload = Upload(bytes(20))
    upload.heard(14)
    upload.heard(7)
    piece = upload.due(0.0)
    assert piece is not None
    assert piece[0] == 7
    upload.heard(21)
    assert upload.stored == 7, "nobody has stored more than there is"


def test_nothing_to_take_is_a_whole_file_without_bytes() -> None:
    download = Download()
    download.heard(0, 0, memoryview(b""))
    assert download.is_complete
    assert not download.data
