#!/usr/bin/env python3
"""Reads an encrypted journal (<segment>.open) without Klio: P10, docs/formats.md.

    age -d -i identity.txt <cluster>/open.key.age | open-journal.py <segment>.open >segment.part

Needs python3, openssl and zstd. Writes the WAL that is whole; says on standard error up to which LSN. The tags are not
checked (openssl enc cannot): a frame counts when it continues the one before, in this journal.
"""
import hashlib, hmac, struct, subprocess, sys


def hkdf(key, salt, info, length=32):
    prk = hmac.new(salt, key, hashlib.sha256).digest()
    return hmac.new(prk, info + b"\x01", hashlib.sha256).digest()[:length]


def run(command, data):
    return subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


data_key = bytes.fromhex(sys.stdin.read().split()[2])
with open(sys.argv[1], "rb") as file:
    journal = file.read()
magic, version = journal[:8], struct.unpack_from("<I", journal, 8)[0]
encrypted = version == 2 or (version == 3 and journal[36] == 1)
if magic != b"KLIOJRNL" or not encrypted:
    sys.exit(f"expected an encrypted journal, found {magic!r} version {version}")
frame_magic, header = (b"KWF2", 48) if version == 2 else (b"KWE3", 56)
if journal[56:64] != hkdf(data_key, b"\0" * 32, b"klio key id", 32)[:8]:
    sys.exit("expected the open key of this cluster, found another")
position = struct.unpack_from("<Q", journal, 24)[0]
key = hkdf(data_key, journal[64:80], b"klio journal 2" + journal[:48]).hex()
offset = 4096
while journal[offset : offset + 4] == frame_magic:
    codec, = struct.unpack_from("<B", journal, offset + 4)
    start, raw, stored = struct.unpack_from("<QII", journal, offset + 16)
    if journal[offset + 8 : offset + 16] != journal[40:48] or start != position:
        break
    if codec == 2:  # a closing frame: no WAL
        offset += header
        continue
    # GCM is counter mode: the first block of the text is number 2, after nonce = the frame's offset.
    counter = struct.pack("<Q", offset) + bytes(4) + struct.pack(">I", 2)
    text = run(["openssl", "enc", "-d", "-aes-256-ctr", "-K", key, "-iv", counter.hex()],
               journal[offset + header : offset + header + stored])
    plain = run(["zstd", "-dqc"], text) if codec == 1 else text
    assert len(plain) == raw, f"expected {raw} bytes at offset {offset}, found {len(plain)}"
    sys.stdout.buffer.write(plain)
    position, offset = position + raw, offset + header + stored
print(f"WAL up to {position >> 32:X}/{position & 0xFFFFFFFF:X}", file=sys.stderr)
