# Reads a VHDX with libvhdi: vhdi.py FILE [PARENT [GRANDPARENT...]]. Each line of the input is an offset and a length; the answer is
# the bytes, as they are.
import sys

import pyvhdi

files = []
for name in sys.argv[1:]:
    file = pyvhdi.file()
    file.open(name)
    files.append(file)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
out = sys.stdout.buffer
for line in sys.stdin:
    offset, length = map(int, line.split())
    while length:
        part = files[0].read_buffer_at_offset(length, offset)
        if not part:
            sys.exit(f"nothing at {offset}")
        out.write(part)
        offset += len(part)
        length -= len(part)
    out.flush()
