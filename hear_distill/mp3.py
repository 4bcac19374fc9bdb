"""MP3 bytes in, MP3 bytes out that libsndfile reads to their end.

libsndfile reads no further than the number of frames in the tag of the first frame (Xing or Info) or, without one, than
an estimate from the bit rate of the first frame: of 30 s at a variable rate we saw 5 and 6. And its decoder gives up at
more than 1,024 bytes of junk. So an MP3 without a tag, with a tag that says too little, or with junk between its frames
is rewritten here: a tag with the true number, then the frames and nothing else.

Header fields: ISO/IEC 11172-3, 2.4.1.3, and 13818-3, 2.4.2.3. The tag has no standard, but one place and one layout.
"""

import functools
import re

VERSION_1, VERSION_2, VERSION_2_5 = 3, 2, 0  # as in the header
RATES_HZ = {
    VERSION_1: (44_100, 48_000, 32_000),
    VERSION_2: (22_050, 24_000, 16_000),
    VERSION_2_5: (11_025, 12_000, 8_000),
}
KBPS_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)  # 0 is free format, which we leave alone
KBPS_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)  # versions 2 and 2.5
TAG_KBPS = 64  # frames of 144 bytes or more: room for a tag at every sample rate
NO_CHECKSUM = 1  # the bit of byte 1 that is set if no 2 bytes of CRC follow the header


def made_whole(data: bytes) -> bytes:
    """An MP3 of layer III -> one that holds the same sound and whose tag hides none of it. Anything else as it is.

    What has a good tag and no junk before or between its frames comes back as the same object. A file that gets a new
    tag begins with the delay of its encoder (576 samples for LAME): only the encoder's own tag tells to trim it.
    """
    start = after_id3(data)
    header = data[start : start + 4]
    if frame_bytes(header) == 0:
        return data
    first = data[start : start + frame_bytes(header)]
    is_tag, num_said = read_tag(first)
    runs, num_frames = find_frames(data, start + len(first) if is_tag else start, header)
    is_good_tag = num_said >= num_frames
    if num_frames < 2 or (is_good_tag and len(runs) == 1):  # two headers by chance are rare, one is not
        return data[start:]  # libsndfile does not know of every ID3
    tag = first if is_good_tag else write_tag(header, num_frames)
    return tag + b"".join(data[begin:end] for begin, end in runs)


def after_id3(data: bytes) -> int:
    """Where the ID3v2 tags at the beginning end; 0 if there are none."""
    start = 0
    while data.startswith(b"ID3", start) and len(data) >= start + 10:
        a, b, c, d = data[start + 6 : start + 10]  # 7 bits each
        has_footer = data[start + 5] & 0x10
        start += 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if has_footer else 0)
    return start


def frame_bytes(header: bytes) -> int:
    """Length of the layer III frame that begins with these 4 bytes; 0 if none does, or one of free format."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:  # 11 bits of sync, then version, layer
        return 0
    version, bit_rate, rate, padding = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3, header[2] >> 1 & 1
    if version not in RATES_HZ or bit_rate in (0, 15) or rate == 3:
        return 0
    if version == VERSION_1:
        return 144_000 * KBPS_1[bit_rate] // RATES_HZ[version][rate] + padding
    return 72_000 * KBPS_2[bit_rate] // RATES_HZ[version][rate] + padding


def find_frames(data: bytes, start: int, header: bytes) -> tuple[list[tuple[int, int]], int]:
    """Where frames like that of `header` lie without a gap, as (begin, end), and how many frames these are.

    The first run begins at `start`, and is empty if what lies there is junk. A frame that the end cuts off is left out.
    """
    lengths = _lengths_like(header[1] | NO_CHECKSUM, header[2] & 0x0C)
    runs, num_frames, position = [], 0, start
    while position is not None:
        begin = position
        while 0 < (length := lengths.get(data[position : position + 3], 0)) <= len(data) - position:
            position += length
            num_frames += 1
        runs.append((begin, position))
        position = _behind_junk(data, position, header, lengths)
    return runs, num_frames


@functools.cache
def _lengths_like(version_byte: int, rate_bits: int) -> dict[bytes, int]:
    """Length of a frame by its first three bytes, for all of this version and sample rate: asked once per frame."""
    starts = [
        bytes([0xFF, version_byte & ~NO_CHECKSUM | checksum, bit_rate << 4 | rate_bits | low_bits])
        for checksum in (0, NO_CHECKSUM)
        for bit_rate in range(1, 15)
        for low_bits in range(4)
    ]
    return {three: frame_bytes(three + b"\0") for three in starts}


def _behind_junk(data: bytes, position: int, header: bytes, lengths: dict[bytes, int]) -> int | None:
    """The next place where a frame like that of `header` begins that ends at another or at the end of the data."""
    sync = re.compile(b"\xff[" + re.escape(bytes({three[1] for three in lengths})) + b"]")

    def length_at(place: int) -> int:
        there = data[place : place + 4]
        return lengths.get(there[:3], 0) if len(there) == 4 and is_mono(there) == is_mono(header) else 0

    for match in sync.finditer(data, position):
        length = length_at(match.start())
        end = match.start() + length
        if length > 0 and (end == len(data) or length_at(end) > 0):
            return match.start()
    return None


def is_mono(header: bytes) -> bool:
    """The channel mode is the upper two bits of byte 3; a recording may change between the other three."""
    return header[3] >> 6 == 3


def tag_offset(header: bytes) -> int:
    """Where a tag begins in a frame without checksum: behind the header and the side information, which is zeros."""
    if header[1] >> 3 & 3 == VERSION_1:
        return 4 + (17 if is_mono(header) else 32)
    return 4 + (9 if is_mono(header) else 17)


def read_tag(frame: bytes) -> tuple[bool, int]:
    """Is this frame a tag instead of sound, and how many frames does it say are behind it; -1 if it does not say."""
    if frame[36:40] == b"VBRI":  # of Fraunhofer's encoder, which libsndfile does not read
        return True, -1
    has_checksum = not frame[1] & NO_CHECKSUM
    for offset in (tag_offset(frame), tag_offset(frame) + 2)[: 1 + has_checksum]:  # 2 bytes of CRC come first, or not
        word, flags, number = (
            frame[offset : offset + 4],
            frame[offset + 7 : offset + 8],
            frame[offset + 8 : offset + 12],
        )
        if word in (b"Xing", b"Info"):
            is_read_by_all = len(number) == 4 and flags[0] & 1 and not has_checksum
            return True, int.from_bytes(number, "big") if is_read_by_all else -1
    return False, -1


def write_tag(header: bytes, num_frames: int) -> bytes:
    """A frame of version, sample rate and channels of `header`, silent, that says how many frames are behind it."""
    kbps = KBPS_1 if header[1] >> 3 & 3 == VERSION_1 else KBPS_2
    header = bytes([0xFF, header[1] | NO_CHECKSUM, kbps.index(TAG_KBPS) << 4 | header[2] & 0x0C, header[3]])
    tag = b"Info" + (1).to_bytes(4, "big") + num_frames.to_bytes(4, "big")
    return (header.ljust(tag_offset(header), b"\0") + tag).ljust(frame_bytes(header), b"\0")
