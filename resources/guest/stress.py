"""Reads a disk past the page cache again and again, writes to what it has read at any moment, and looks whether a write is lost.

In the disk, each word of a page is the page's number. A read fills pages that the host may share with others soon after: writes fall
before, into and behind the moment at which it does.
"""

import os
import random
import struct
import sys
import time

PAGE = 4096
PAGES = 256
WORDS = PAGE // 8

device, seconds = sys.argv[1], float(sys.argv[2])
random.seed(os.urandom(8))
disk = os.open(device, os.O_RDONLY | os.O_DIRECT)
size = os.lseek(disk, 0, os.SEEK_END) // PAGE
# A large object is a mapping of its own with a header of 16 bytes; a read past the page cache wants whole pages.
HEADER = 16
room = bytearray((PAGES + 1) * PAGE)
memory = memoryview(room)[PAGE - HEADER :][: PAGES * PAGE]
rounds = writes = 0
end = time.monotonic() + seconds
while time.monotonic() < end:
    first = random.randrange(size - PAGES)
    if os.preadv(disk, [memory], first * PAGE) != PAGES * PAGE:
        sys.exit("STRESS short read")
    written = {}
    rest = time.monotonic() + random.choice((0, 0.1, 0.3, 0.7, 1.5))
    # Most pages are left alone, or nothing would be shared.
    hot = random.sample(range(PAGES), 32)
    while True:
        page, word, value = random.choice(hot), random.randrange(WORDS), random.getrandbits(64)
        struct.pack_into("<Q", memory, page * PAGE + word * 8, value)
        written[page, word] = value
        writes += 1
        if time.monotonic() >= rest:
            break
        time.sleep(random.choice((0, 0, 0.01)))
    for page in range(PAGES):
        expected = [first + page] * WORDS
        for word in range(WORDS):
            value = written.get((page, word))
            if value is not None:
                expected[word] = value
        if memory[page * PAGE : (page + 1) * PAGE] != struct.pack(f"<{WORDS}Q", *expected):
            sys.exit(f"STRESS LOST page {first + page} in round {rounds}")
    rounds += 1
print(f"STRESS {rounds} rounds, {writes} writes", flush=True)
