"""
The default dataset, which needs no download: the source of the standard library of the python that runs this.
One token is one byte.

    python data/python/prepare.py

It writes train.bin, val.bin (the last tenth) and meta.json beside itself, in a second. The counts depend on
the version of python, and a little on who built it. Expected for 3.11.7:

    train.bin  9,959,023 tokens
    val.bin    1,106,559 tokens
"""
import platform
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import publish_dataset

HERE = Path(__file__).resolve().parent
# tests outweigh the library they test, and the rest is not there in every installation
LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idlelib', 'lib2to3'}

def prepare(folder=HERE):
    library = Path(sysconfig.get_path('stdlib'))
    names = sorted(path.relative_to(library).as_posix() for path in library.rglob('*.py'))
    names = [name for name in names if not LEFT_OUT.intersection(name.split('/')[:-1])]
    data = np.frombuffer(b''.join((library / name).read_bytes() for name in names), dtype=np.uint8)

    n = len(data) * 9 // 10
    data[:n].tofile(folder / 'train.bin.part')
    data[n:].tofile(folder / 'val.bin.part')
    print(f'python {platform.python_version()}: {len(names)} files, {len(data):,} bytes')
    publish_dataset(folder, encoding='bytes', vocab_size=256, dtype='uint8')

if __name__ == '__main__':
    sys.excepthook = explain
    prepare()
