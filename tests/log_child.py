"""A process that appends numbered entries until it is killed, and prints what is durable.

python log_child.py FOLDER FIRST
"""

import asyncio
import sys
from pathlib import Path

from log_helpers import SMALL, open_log, payload, stored


async def main(folder: Path, number: int) -> None:
    log = await open_log(folder, SMALL)
    print("open", flush=True)
    while True:
        for _ in range(1 + number % 3):
            log.append(stored(number), payload(number))
            number += 1
        await log.flush()
        print(number - 1, flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
