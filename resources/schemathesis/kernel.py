"""Writes a kernel that stands still for ever, which any KVM can run: kernel.py FILE."""

import struct
import sys

ADDRESS = 0x100000
CODE_AT = 0x1000
# hlt; jmp to it
CODE = b"\xf4\xeb\xfd"

head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ADDRESS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
head += struct.pack("<IIQQQQQQ", 1, 7, CODE_AT, ADDRESS, ADDRESS, len(CODE), 1 << 16, 0x1000)
with open(sys.argv[1], "wb") as file:
    file.write(head.ljust(CODE_AT, b"\0") + CODE)
