"""How many bytes a video file must have by its own structure, which tells one that was cut off.

need = least_bytes(Path("a.webm"), "webm")      # more than the file has: it was cut

Only headers are read, and a structure that is not understood asks for nothing. What stays unseen is
a cut exactly between two parts of a file that says neither its size nor that it ends (live
Matroska, fragmented MP4, FLV, an AVI never closed, MPEG program and transport streams), and any cut
of a broadcast ASF, a live RealMedia, a compressed SWF, or a bare MPEG or DV stream (decoding sees
some). An Ogg stream whose last page has no end flag counts as cut. An ASF may lack its index, an
AVI 8 bytes and a RealMedia 10: some writers count a header twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Read = Callable[[int, int], bytes]
"""The bytes at a place, as many as asked for or as are left."""

MOV_BOXES = (
    *(b"ftyp", b"styp", b"moov", b"moof", b"mfra", b"mdat", b"free", b"skip", b"wide"),
    *(b"uuid", b"meta", b"udta", b"sidx", b"ssix", b"prft", b"emsg"),
)
SEGMENT = b"\x18\x53\x80\x67"
UNKNOWN_RIFF = (0, 0xFFFFFFFF)  # a stream that was never closed
RIFF_SLACK = 8
PACK, PROGRAM_END, FIRST_PACKET = 0xBA, 0xB9, 0xBB  # start codes of ISO 13818-1, table 2-18
TS_SYNC = b"\x47"
FLV_TAGS = (8, 9, 18)  # sound, picture, script
ASF_OBJECTS = (  # header, data, index
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    b"\x36\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c",
    b"\x90\x08\x00\x33\xb1\xe5\xcf\x11\x89\xf4\x00\xa0\xc9\x03\x49\xcb",
)
ASF_UNKNOWN = 50  # the head of a data object alone
LAST_PAGE = 4  # a flag of Ogg's pages
RM_SLACK = 10
RM_CHUNKS = (b".RMF", b"PROP", b"CONT", b"MDPR", b"DATA", b"INDX")
MXF_KEY = b"\x06\x0e\x2b\x34"
GIF_END, GIF_EXTENSION, GIF_IMAGE = 0x3B, 0x21, 0x2C


def least_bytes(path: Path, container: str) -> int:
    """Return the size that a file must have, 0 if it cannot be told; `OSError` if unreadable.

    container: FFmpeg's name of it. A file whose end is not marked needs a byte more than it has.
    """
    if container not in WALKS:
        return 0
    size = path.stat().st_size
    with path.open("rb") as file:

        def read(place: int, count: int) -> bytes:
            file.seek(place)
            return file.read(count)

        return WALKS[container](read, size)


def _mov(read: Read, size: int) -> int:
    """Walk the boxes of ISO 14496-12: size, type, and a long size if the short one is 1."""
    place = 0
    while place < size:
        head = read(place, 16)
        length = int.from_bytes(head[:4])
        if length == 1:
            length = int.from_bytes(head[8:])
        if head[4:8] not in MOV_BOXES or length < 8:  # 0: up to the end
            break
        place += length
    return place


def _matroska(read: Read, size: int) -> int:
    """Walk EBML elements (RFC 8794); those of unknown size, as in a live stream, are entered."""
    place = 0
    while place < size:
        first = read(place, 1)[0]
        id_bytes = 9 - first.bit_length()
        head = read(place, id_bytes + 8)
        name, tail = head[:id_bytes], head[id_bytes:]
        size_bytes = 9 - tail[0].bit_length() if tail else 1
        if id_bytes > 4 or size_bytes > 8:
            break
        most = (1 << 7 * size_bytes) - 1
        length = int.from_bytes(tail[:size_bytes]) & most
        is_known = length != most
        place += id_bytes + size_bytes + is_known * length
        if name == SEGMENT and is_known:
            break
    return place


def _avi(read: Read, size: int) -> int:
    """Walk RIFF chunks, of which OpenDML has several."""
    place = need = 0
    while place < size:
        head = read(place, 8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in UNKNOWN_RIFF:
            break
        need = place + length + 8 - RIFF_SLACK
        place += 8 + length + length % 2
    return need


def _mpeg(read: Read, size: int) -> int:
    """Walk packs and packets of a program stream (ISO 13818-1, 2.5; ISO 11172-1)."""
    place = 0
    while place < size:
        head = read(place, 14)
        code = head[3] if len(head) > 3 and head[:3] == b"\0\0\1" else 0
        if code == PACK:
            is_second = int.from_bytes(head[4:5]) >> 6 == 1  # MPEG-2; its packs may be stuffed
            place += 14 + int.from_bytes(head[13:]) % 8 if is_second else 12
        elif code == PROGRAM_END:
            place += 4
        elif code >= FIRST_PACKET:
            place += 6 + int.from_bytes(head[4:6])
        else:
            break
    return place


def _mpegts(read: Read, size: int) -> int:
    """Ask for whole packets, which a transport stream is made of; a Blu-ray's have times before."""
    for packet, sync in ((188, 0), (192, 4)):
        if all(read(sync + i * packet, 1) == TS_SYNC for i in range(3)):
            return -(-size // packet) * packet
    return 0


def _flv(read: Read, size: int) -> int:
    """Walk tags, each with a size of 4 bytes before and after it."""
    place = int.from_bytes(read(5, 4)) + 4
    while place < size:
        head = read(place, 11)
        if head[0] not in FLV_TAGS:
            break
        place += 15 + int.from_bytes(head[1:4])
    return place


def _asf(read: Read, size: int) -> int:
    """Walk objects: an identifier of 16 bytes, and a size; a broadcast's data has none."""
    place = 0
    while place < size:
        head = read(place, 24)
        length = int.from_bytes(head[16:], "little")
        if head[:16] not in ASF_OBJECTS or length <= ASF_UNKNOWN:
            break
        place += length
    return place


def _ogg(read: Read, size: int) -> int:
    """Walk pages (RFC 3533), the last of which has to say so, of each stream."""
    place = 0
    is_ended: dict[bytes, bool] = {}
    while place < size:
        head = read(place, 27 + 255)
        if not b"OggS".startswith(head[:4]):
            return 0
        is_ended[head[14:18]] = bool(int.from_bytes(head[5:6]) & LAST_PAGE)
        count = int.from_bytes(head[26:27])
        place += 27 + count + sum(head[27 : 27 + count])
    return place if all(is_ended.values()) else max(place, size + 1)


def _gif(read: Read, size: int) -> int:
    """Walk the blocks of GIF89a up to the trailer; what follows it does not matter."""
    place = 13 + _gif_colors(read(10, 1))
    while place < size:
        head = read(place, 10)
        if head[0] == GIF_END:
            return place + 1
        if head[0] == GIF_EXTENSION:
            place = _after_sub_blocks(read, place + 2, size)
        elif head[0] == GIF_IMAGE:
            place = _after_sub_blocks(read, place + 11 + _gif_colors(head[9:]), size)
        elif head[0] == 0:  # an empty block too many, which all readers skip
            place += 1
        else:
            return 0
    return max(place, size + 1)


def _gif_colors(flags: bytes) -> int:
    """Return the bytes of the table that flags announce."""
    value = int.from_bytes(flags)
    return 3 << value % 8 + 1 if value & 0x80 else 0


def _after_sub_blocks(read: Read, place: int, size: int) -> int:
    while place < size and (count := read(place, 1)[0]):
        place += 1 + count
    return place + 1


def _swf(read: Read, size: int) -> int:
    """Read the length that an uncompressed movie says."""
    return int.from_bytes(read(4, 4), "little") if read(0, 3) == b"FWS" else 0


def _rm(read: Read, size: int) -> int:
    """Walk chunks: type, and a size that counts it."""
    place = 0
    while place < size:
        head = read(place, 8)
        length = int.from_bytes(head[4:])
        if head[:4] not in RM_CHUNKS or length < 8:
            break
        place += length
    return max(0, place - RM_SLACK)


def _mxf(read: Read, size: int) -> int:
    """Walk keys of 16 bytes, each with the length of its value (SMPTE 336M)."""
    place = 0
    while place < size:
        head = read(place, 25)
        if not MXF_KEY.startswith(head[: len(MXF_KEY)]):
            break
        count = int.from_bytes(head[16:17])
        long = max(0, count - 0x80)
        if long > 8:
            break
        place += 17 + long + (int.from_bytes(head[17 : 17 + long]) if long else count)
    return place


def _ivf(read: Read, size: int) -> int:
    """Walk frames, each with its size and time before it."""
    place = int.from_bytes(read(6, 2), "little") if read(0, 4) == b"DKIF" else size
    while place < size:
        length = int.from_bytes(read(place, 4), "little")
        if not length:
            break
        place += 12 + length
    return place


WALKS: dict[str, Callable[[Read, int], int]] = {
    "mov": _mov,
    "matroska": _matroska,
    "webm": _matroska,
    "avi": _avi,
    "mpeg": _mpeg,
    "mpegts": _mpegts,
    "flv": _flv,
    "asf": _asf,
    "ogg": _ogg,
    "gif": _gif,
    "swf": _swf,
    "rm": _rm,
    "mxf": _mxf,
    "ivf": _ivf,
}
