"""
Tiny Shakespeare, one token per character: 1.1 MB of plays, the classic first dataset.

    python data/shakespeare_char/prepare.py

It downloads input.txt and writes train.bin, val.bin (the last tenth) and meta.json beside itself. Expected:

    train.bin  1,003,854 tokens
    val.bin      111,540 tokens
"""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2])) # the root of the repository
from configurator import explain
from data.download import download
from data.text.prepare import prepare as prepare_text

HERE = Path(__file__).resolve().parent
URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

def prepare(folder=HERE, url=URL, sha256=SHA256):
    download(url, folder / 'input.txt', sha256=sha256)
    prepare_text([folder / 'input.txt'], folder=folder, chars=True)

if __name__ == '__main__':
    sys.excepthook = explain
    prepare()
