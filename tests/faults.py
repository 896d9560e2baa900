"""
What may break, broken on purpose, from a fixed seed:  python tests/faults.py  (half an hour on one core)

    python tests/faults.py kill_train command_lines         # some of the rows
    python tests/faults.py --tries=100                      # instead of 30; command lines are ten times as many

Each row of the table says how often something was tried, how often the outcome was as it should be, and how often not. That means:
a run that is killed and resumed ends in the weights of an uninterrupted one, bit for bit; damage is noticed, or has changed
nothing that is read; a program that gives up says why in one sentence, and leaves its earlier files unchanged. Linux.
"""
import json
import math
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS='1', HF_ENDPOINT='http://127.0.0.1:9')       # one thread, and no hub; set before torch is loaded

import torch

from data.download import publish_dataset
from model import GPT, GPTConfig
from pretrained import build, export, tokenizer
from runtime import load_checkpoint, open_data, save_checkpoint
from test_scripts import command

TRIES = 30
SHAPE = dict(dataset='tiny', block_size=16, batch_size=4, gradient_accumulation_steps=2, eval_windows=9, device='cpu', warmup_iters=1)
TRAIN = dict(SHAPE, n_layer=3, n_head=2, n_embd=16, dropout=0.1, max_iters=60, eval_interval=3, log_interval=1)
RETROFIT = dict(SHAPE, teacher='teacher.pt', bits=1.5, spread_windows=2, max_iters=60, eval_interval=3, log_interval=1)
chance = random.Random(0)

def run(arguments, **how):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **how)

def says_why(result):
    """Whether a process said why it gave up, and showed no traceback. Python's own words at its end, with status 120, are no reason."""
    return result.returncode == 1 and 'Traceback' not in result.stderr and bool(result.stderr.strip())

def same_weights(one, other):
    one, other = (load_checkpoint(path)['model'] for path in (one, other))
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())

# -----------------------------------------------------------------------------
# killed, and resumed

def killed(start, longest):
    """Starts a process, kills it and all its children at a random moment, and says whether it was still at work."""
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        time.sleep(chance.uniform(0.2, longest))
        alive = process.poll() is None
        everyone = [process.pid, *descendants(process.pid)]     # torchrun's have sessions of their own
        for pid in everyone:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    while any(map(running, everyone)):
        time.sleep(0.05)
    return alive

def descendants(pid):
    children = list(map(int, run(['pgrep', '-P', str(pid)]).stdout.split()))
    return children + [grandchild for child in children for grandchild in descendants(child)]

def running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False

def kill_and_resume(script, flags, where, processes=1):
    """
    One run, killed again and again, each time resumed from where it was; then it may end. Each kill is a try, and all of
    them are lost if the weights are not those of the run that nothing disturbed.
    """
    began = time.time()
    result = run(command(script, processes, out_dir='undisturbed', **flags))
    assert result.returncode == 0, result.stderr
    longest, kills = time.time() - began, 0
    while kills < TRIES:
        shutil.rmtree('disturbed', ignore_errors=True)
        begun = Path('disturbed', where)
        while kills < TRIES and killed(command(script, processes, out_dir='disturbed', **resumed(script, flags, begun)), longest):
            kills += 1
        result = run(command(script, processes, out_dir='disturbed', **resumed(script, flags, begun)))
        if result.returncode or not same_weights(begun, Path('undisturbed', where)):
            return TRIES, 0
    return TRIES, TRIES

def resumed(script, flags, begun):
    first = 'scratch' if script == 'train.py' else 'teacher'
    return dict(flags, init_from='resume' if begun.exists() else first)

def kill_train():
    return kill_and_resume('train.py', TRAIN, 'last.pt')

def kill_train_of_two_processes():
    return kill_and_resume('train.py', TRAIN, 'last.pt', processes=2)

def kill_retrofit():
    return kill_and_resume('retrofit.py', RETROFIT, 'midpoint_a_1.5bit/last.pt')

def kill_prepare():
    """data/python/prepare.py, which needs a second: after a kill there is no data set, or the whole one; after the next run the whole one."""
    def files():
        return {path.name: path.read_bytes() for path in Path('data/python').glob('*.*') if path.suffix in ('.bin', '.json', '.part')}

    prepare, good = [sys.executable, 'data/python/prepare.py'], 0
    assert run(prepare).returncode == 0
    undisturbed = files()
    for _ in range(TRIES):
        killed(prepare, 1.5)
        left = files()
        whole = 'meta.json' not in left or {name: left.get(name) for name in undisturbed} == undisturbed
        good += whole and run(prepare).returncode == 0 and files() == undisturbed
    return TRIES, good

def kill_download():
    """A file of 2 MB from a slow server, fetched by as many processes as it takes."""
    content, good = chance.randbytes(2_000_000), 0

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            first = int(self.headers.get('Range', 'bytes=0-').split('=')[1].split('-')[0])
            self.send_response(206 if first else 200)
            if first:
                self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
            self.send_header('Content-Length', str(len(content) - first))
            self.end_headers()
            try:
                for i in range(first, len(content), 1 << 16):
                    self.wfile.write(content[i:min(i + (1 << 16), len(content))])
                    time.sleep(0.02)
            except ConnectionError:
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    fetch = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r}); from data.download import download; '
             f'download("http://127.0.0.1:{server.server_port}/file", "fetched/file")']
    for _ in range(TRIES):
        killed(fetch, 1.5)
        if Path('fetched/file').exists() or chance.random() < 0.3:
            run(fetch)
            good += Path('fetched/file').read_bytes() == content
            shutil.rmtree('fetched')
        else:
            good += 1                       # anything that a kill has lost shows when the file is complete
    server.shutdown()
    return TRIES, good

# -----------------------------------------------------------------------------
# no room

def small_files(limit):
    """No file may grow beyond this many bytes, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

def full_disk(script, flags, where):
    good = 0
    for _ in range(TRIES // 3):
        shutil.rmtree('crowded', ignore_errors=True)
        assert run(command(script, out_dir='crowded', **dict(flags, max_iters=3))).returncode == 0
        path = Path('crowded', where)
        before, size = path.read_bytes(), path.stat().st_size
        more = dict(flags, max_iters=6) if script == 'train.py' else flags
        result = run(command(script, out_dir='crowded', **more, init_from='resume' if script == 'train.py' else 'teacher'),
                     preexec_fn=small_files(chance.randrange(size)))
        good += says_why(result) and path.read_bytes() == before and not list(Path('crowded').rglob('*.pt.part'))
    return TRIES // 3, good

def full_disk_train():
    return full_disk('train.py', dict(TRAIN, lr_decay_iters=9), 'last.pt')

def full_disk_retrofit():
    return full_disk('retrofit.py', RETROFIT, 'midpoint_a_1.5bit/last.pt')

def full_disk_prepare():
    good = 0
    for _ in range(TRIES // 3):
        result = run([sys.executable, 'data/python/prepare.py'], preexec_fn=small_files(chance.randrange(5_000_000)))
        good += says_why(result)
    return TRIES // 3, good

def full_disk_of_any_file():
    """Export, the tables of evaluate.py and bench.py; and what each script prints."""
    scripts = {'sample.py': dict(SCRIPTS['sample.py']), 'evaluate.py': dict(SCRIPTS['evaluate.py']), 'train.py': dict(TRAIN, out_dir='printed'),
               'retrofit.py': dict(RETROFIT, out_dir='printed')}
    bench = [sys.executable, str(ROOT / 'bench.py'), 'depth', *'--layers=[1] --n_embd=32 --n_head=2 --block_size=16 --cases=leapfrog'.split()]
    good = 0
    with open('/dev/full', 'w') as full:
        commands = [*(command(script, **flags) for script, flags in scripts.items()), bench, [sys.executable, 'data/python/prepare.py']]
        for arguments in commands:
            result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
            good += says_why(result)
    export_it = [sys.executable, str(ROOT / 'pretrained.py'), 'sound.pt']
    writing = [([*export_it, 'exported'], 'exported', 10000), ([*export_it, 'exported.pt'], 'exported.pt', 10000),
               (command('evaluate.py', **SCRIPTS['evaluate.py'], json='table.json'), 'table.json', 50), ([*bench, '--json=bench.json'], 'bench.json', 200)]
    for arguments, target, most in writing:
        result = run(arguments, preexec_fn=small_files(chance.randrange(most)))
        path = Path(target)                     # not there, or empty as it was before the first row
        good += says_why(result) and (not path.exists() or path.is_file() and path.stat().st_size in (0, 2))
    return len(commands) + len(writing), good

# -----------------------------------------------------------------------------
# damage

def as_scripts_do(use):
    """use(), whose ValueErrors are sentences that end a script."""
    try:
        return use()
    except ValueError as error:
        sys.exit(str(error))

def damage(path, use, sound, flipped=None):
    """
    Flips a bit in the first `flipped` bytes of the file (None: in all of it, 0: never), or cuts it off, at random. use(), in a process
    of its own, must end in a sentence, or give what it gave before.
    """
    def compare():
        if as_scripts_do(use) != sound:
            sys.exit('other numbers')

    content, good = path.read_bytes(), 0
    flipped = len(content) if flipped is None else flipped
    for k in range(10 * TRIES):
        if k % 5 == 0 or not flipped:
            path.write_bytes(content[:chance.randrange(len(content))])
        else:
            place = chance.randrange(flipped)
            path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1:])
        code, said = in_a_child(compare)
        good += code == 0 or code == 1 and 'Traceback' not in said and 'other numbers' not in said
    path.write_bytes(content)
    return 10 * TRIES, good

def in_a_child(work, seconds=60):
    """(exit status, what it wrote to stderr) of a forked process: it has torch already."""
    with tempfile.TemporaryFile('w+') as output:
        sys.stdout.flush()
        if not (child := os.fork()):
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = open(output.fileno(), 'w', closefd=False)
            status = 0
            try:
                resource.setrlimit(resource.RLIMIT_AS, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + (6 << 30),) * 2)
                signal.alarm(seconds)
                work()
            except SystemExit as stop:
                status = 0 if stop.code in (None, 0) else 1
                if isinstance(stop.code, str):
                    print(stop.code, file=sys.stderr, flush=True)
            except BaseException as error:
                status = 1
                sys.excepthook(type(error), error, error.__traceback__)
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()

def damaged_checkpoint():
    def use():
        return [weight.tolist() for weight in load_checkpoint('sound.pt')['model'].values()]

    return damage(Path('sound.pt'), use, use())

def damaged_data():
    def use():
        meta, train, val = open_data(SimpleNamespace(dataset='tiny', block_size=16))
        return train.tobytes() + val.tobytes(), [meta.get(name) for name in ('encoding', 'vocab_size', 'dtype')]       # what is read of it

    results = [damage(Path('data/tiny', name), use, use()) for name in ('train.bin', 'val.bin', 'meta.json')]
    return tuple(map(sum, zip(*results)))

def damaged_safetensors():
    """Bits are flipped in the header alone: the format has no checksums, so a flipped bit among the weights would go unnoticed."""
    def use():
        return [weight.tolist() for weight in build('folder')[0].state_dict().values()]

    path = Path('folder/model.safetensors')
    return damage(path, use, use(), flipped=8 + struct.unpack('<Q', path.read_bytes()[:8])[0])

def damaged_tokenizer():
    """The file is only cut off: with a changed letter in a word it is another valid tokenizer."""
    try:
        import tokenizers
    except ImportError:
        return 0, 0
    path = Path('folder/tokenizer.json')
    vocabulary = {word: i for i, word in enumerate(['<unk>', 'to', 'be', 'or', 'not'])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='<unk>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(path))

    def use():
        return tokenizer(dict(encoding='tokenizer.json', model='folder'))[0]('to be')

    return damage(path, use, use(), flipped=0)

# -----------------------------------------------------------------------------
# what is typed

VALUES = ['0', '-1', '1', '2', '3', '7', '16', '10**9', '1000000000', '-0.5', '0.5', '1e-3', 'nan', 'inf', '-inf', '1e400', 'None', 'True',
          'False', '[]', '[1]', '[0.5,0.5]', '[1,"a"]', '{}', '()', '""', 'abc', 'auto', 'random', 'bdia', 'all', 'cpu', 'cuda', 'mps', 'float32', 'bfloat16',
          'float16', 'resume', 'scratch', 'standard', 'midpoint', 'leapfrog', 'symplectic', 'midpoint_a', 'midpoint_sum', 'gpt2', 'tiny', 'none',
          'sound.pt', 'folder', 'data', '/', '..', '\x00', 'é', '2**63', '9223372036854775808', '-9223372036854775809', "'", '\\', '--', '=']
SCRIPTS = {'train.py': dict(TRAIN, max_iters=1), 'retrofit.py': dict(RETROFIT, max_iters=1), 'sample.py': dict(init_from='sound.pt', max_new_tokens=3),
           'evaluate.py': dict(init_from='sound.pt', datasets='tiny', block_size=16, eval_windows=4, device='cpu')}

def command_lines():
    """One to three flags with values of any kind; sometimes a name that is misspelt, or a word that is no flag."""
    good = 0
    for _ in range(10 * TRIES):
        script = chance.choice(list(SCRIPTS))
        source = (ROOT / script).read_text() + (ROOT / 'model.py').read_text() * (script == 'train.py')
        names = sorted({line.split(':')[0].strip() for line in source.splitlines() if line.startswith('    ') and ': ' in line and ' = ' in line
                        and line.split(':')[0].strip().isidentifier()})
        flags = dict(SCRIPTS[script], out_dir='typed') if script in ('train.py', 'retrofit.py') else dict(SCRIPTS[script])
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(names) if chance.random() < 0.95 else 'misspelt'
            flags[name] = chance.choice(['typed', 'sound.pt/x'] if name in ('out_dir', 'json') else VALUES)
        line = [f'--{name}={value}' for name, value in flags.items()] + chance.choice([[]] * 20 + [['word'], ['--'], ['-x'], ['--seed']])
        line = [argument.replace('\x00', '') for argument in line]

        def work():
            sys.argv = [str(ROOT / script), *line]
            runpy.run_path(str(ROOT / script), run_name='__main__')

        code, said = in_a_child(work, seconds=30)
        endless = any('000' in str(flags.get(name, '')) for name in ('max_iters', 'max_new_tokens', 'batch_size', 'gradient_accumulation_steps',
                                                                     'eval_windows', 'warmup_iters', 'num_samples'))
        fine = (code in (0, 1) or code == -signal.SIGALRM and endless) and 'Traceback' not in said         # SIGALRM: it is still at work
        if not fine:
            print(f'{script} {" ".join(line)}: {code} {said[-300:]}', file=sys.stderr)
        good += fine
        shutil.rmtree('typed', ignore_errors=True)
    return 10 * TRIES, good

# -----------------------------------------------------------------------------
# strangers, neighbours

def hostile_files():
    """Malicious files: none is executed, followed or unpacked."""
    class Malice:
        def __reduce__(self):
            return os.mkdir, ('executed',)

    bomb = Path('bomb.pt')
    torch.save(dict(model={}, config={}, meta=Malice()), 'malice.pt')
    with zipfile.ZipFile(bomb, 'w', zipfile.ZIP_DEFLATED) as archive:
        with archive.open('archive/data.pkl', 'w', force_zip64=True) as file:
            for _ in range(64):
                file.write(bytes(1 << 22))          # 256 MB of zeros in all, which compress to about 256 kB
    Path('code.py').write_text('__import__("os").mkdir("executed")\n')
    shutil.copytree('folder', 'outside', dirs_exist_ok=True)
    os.remove('outside/model.safetensors')
    Path('outside/model.safetensors.index.json').write_text(json.dumps(dict(weight_map={'wte.weight': '../folder/model.safetensors'})))
    tries = [lambda: load_checkpoint('malice.pt'), lambda: load_checkpoint('bomb.pt'), lambda: build('outside'), lambda: build('bomb.pt'),
             lambda: build('malice.pt')]
    good = 0
    for use in tries:
        code, said = in_a_child(lambda use=use: as_scripts_do(use), seconds=20)
        good += code == 1 and 'Traceback' not in said
    good += says_why(run([sys.executable, str(ROOT / 'train.py'), 'code.py']))
    return len(tries) + 1, good * (not Path('executed').exists())

def two_runs_in_one_folder():
    with subprocess.Popen(command('train.py', out_dir='shared', **dict(TRAIN, max_iters=10**6)), stdout=subprocess.PIPE, text=True) as first:
        for line in first.stdout:
            if line.startswith('step 1:'):
                break
        second = run(command('train.py', out_dir='shared', **TRAIN))
        first.terminate()
        first.communicate()
    return 1, int(says_why(second) and 'in use by another run' in second.stderr and first.returncode == 0)

def a_process_of_two_dies():
    """The other ends within a minute, with a sentence; so does torchrun."""
    good = 0
    for _ in range(TRIES // 10):
        with subprocess.Popen(command('train.py', 2, out_dir='widowed', **dict(TRAIN, max_iters=10**6)), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as group:
            for line in group.stdout:
                if line.startswith('step 5:'):
                    break
            workers = run(['pgrep', '-P', str(group.pid)]).stdout.split()
            os.kill(int(chance.choice(workers)), signal.SIGKILL)
            began = time.time()
            said = group.communicate(timeout=120)[1]            # reads on: a closed pipe would be another fault
        good += group.returncode != 0 and time.time() - began < 60 and 'Signal 9' in said and 'has lost the others' in said
    return TRIES // 10, good

def out_of_memory_in_one_of_two():
    """A process runs out of memory in a random backward pass: it says so, and the other one ends within a minute, too."""
    good = 0
    for _ in range(TRIES // 10):
        code = ('import os, runpy, model, torch\n'
                'verify, passes = model.Tape.verify, []\n'
                'def lacking(tape):\n'
                '    passes.append(verify(tape))\n'
                f'    if os.environ["RANK"] == "1" and len(passes) == {chance.randrange(1, 9)}: raise torch.OutOfMemoryError("CUDA out of memory")\n'
                'model.Tape.verify = lacking\n'
                f'runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")\n')
        Path('lacking.py').write_text(code)
        began = time.time()
        result = run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'lacking.py', *(
            f'--{name}={value}' for name, value in dict(TRAIN, max_iters=10**6, out_dir='lacking').items())],
            env=dict(os.environ, PYTHONPATH=str(ROOT)))
        good += result.returncode != 0 and time.time() - began < 90 and 'out of memory: try' in result.stderr
    return TRIES // 10, good

def two_machines():
    """Two groups of processes that meet at an address, as on two machines, end in the same weights as one group of two, bit for bit."""
    flags = [f'--{name}={value}' for name, value in dict(TRAIN, max_iters=12).items()]
    assert run([*command('train.py', 2), *flags, '--out_dir=one_machine']).returncode == 0
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
                f'--rdzv_endpoint=127.0.0.1:{port}', '--rdzv_id=two', str(ROOT / 'train.py'), *flags, '--out_dir=two_machines']
    machines = [subprocess.Popen(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    codes = [machine.wait(timeout=300) for machine in machines]
    return 1, int(codes == [0, 0] and same_weights('one_machine/last.pt', 'two_machines/last.pt'))

def restarts_go_on():
    """torchrun --max_restarts=2, whose processes are killed twice on the way. Without the variable a restart may fail (pytorch issue 135712)."""
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=1', '--nproc_per_node=2', '--max_restarts=2', '--monitor_interval=0.5',
                '--rdzv_backend=c10d', '--rdzv_endpoint=127.0.0.1:0', f'--rdzv_id={chance.random()}']
    flags = [f'--{name}={value}' for name, value in dict(TRAIN, max_iters=300, eval_interval=20).items()]
    assert run([*launcher, str(ROOT / 'train.py'), *flags, '--out_dir=calm']).returncode == 0
    good = 0
    for _ in range(TRIES // 10):
        shutil.rmtree('restless', ignore_errors=True)
        with subprocess.Popen([*launcher, str(ROOT / 'train.py'), *flags, '--out_dir=restless'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True) as group:
            kills = 0
            for line in group.stdout:
                if kills < 2 and line.startswith(f'step {100 * (kills + 1)}:'):
                    os.kill(int(chance.choice(run(['pgrep', '-P', str(group.pid)]).stdout.split())), signal.SIGKILL)
                    kills += 1
        good += kills == 2 and group.returncode == 0 and same_weights('calm/last.pt', 'restless/last.pt')
    return TRIES // 10, good

def training_that_cannot_go_on():
    """Weights that become NaN or inf, or grow until states leave the range of integers; data of other tokens, of none, of another model."""
    good, flags = 0, dict(TRAIN, max_iters=6, lr_decay_iters=9)
    assert run(command('train.py', out_dir='begun', **dict(flags, max_iters=3))).returncode == 0
    whole = Path('begun/last.pt').read_bytes()
    weights = [dict.fromkeys(('transformer.h.1.mlp.c_fc.weight',), factor) for factor in (math.nan, math.inf, -math.inf)]
    weights += [dict.fromkeys(('transformer.h.0.attn.c_proj.weight', 'transformer.h.0.mlp.c_proj.weight'), 1e11)]
    for factors in weights:
        checkpoint = load_checkpoint('begun/last.pt')
        save_checkpoint(['begun/last.pt'], dict(checkpoint, model={name: weight * factors.get(name, 1) for name, weight in checkpoint['model'].items()}))
        before = Path('begun/last.pt').read_bytes()
        result = run(command('train.py', out_dir='begun', init_from='resume', **flags))
        good += says_why(result) and 'loss is nan' in result.stderr and Path('begun/last.pt').read_bytes() == before
        Path('begun/last.pt').write_bytes(whole)
    for content, words in ((bytes([200]) * 3000, 'has a token 200'), (b'', 'there is no data'), (bytes(3000), 'trained on other tokens')):
        shutil.copytree('data/tiny', 'data/strange', dirs_exist_ok=True)
        Path('data/strange/train.bin.part').write_bytes(content)
        shutil.copy('data/tiny/val.bin', 'data/strange/val.bin.part')
        with redirect_stdout(None):
            publish_dataset(Path('data/strange'), encoding='bytes', vocab_size=100, dtype='uint8')
        fresh = dict(init_from='scratch', out_dir='strange') if '200' in words else dict(init_from='resume', out_dir='begun')
        result = run(command('train.py', **dict(flags, dataset='strange', **fresh)))
        good += says_why(result) and words in result.stderr and Path('begun/last.pt').read_bytes() == whole
    return len(weights) + 3, good

ROWS = [kill_train, kill_train_of_two_processes, kill_retrofit, kill_prepare, kill_download, full_disk_train, full_disk_retrofit,
        full_disk_prepare, full_disk_of_any_file, training_that_cannot_go_on, damaged_checkpoint, damaged_data, damaged_safetensors, damaged_tokenizer, command_lines, hostile_files,
        two_runs_in_one_folder, a_process_of_two_dies, out_of_memory_in_one_of_two, two_machines, restarts_go_on]

def workshop():
    """Fills the current folder with data and a model in each kind of file."""
    shutil.copytree(ROOT / 'data', 'data', ignore=shutil.ignore_patterns('*.bin', 'meta.json', 'tasks', 'shards'))
    Path('data/tiny').mkdir()
    for split, n in (('train', 3000), ('val', 400)):
        Path(f'data/tiny/{split}.bin.part').write_bytes(bytes(i * i % 61 for i in range(n)))
    with redirect_stdout(None):
        publish_dataset(Path('data/tiny'), encoding='bytes', vocab_size=256, dtype='uint8')
    for name in ('configurator.py', 'model.py', 'pretrained.py', 'runtime.py'):         # which data/text/prepare.py imports
        shutil.copy(ROOT / name, name)
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=256, n_layer=3, n_head=2, n_embd=16, bias=False, scheme='standard')
    for path in ('sound.pt', 'teacher.pt'):
        save_checkpoint([path], dict(model=GPT(config).state_dict(), config=vars(config), meta=dict(encoding='bytes', vocab_size=256)))
    llama = GPTConfig(block_size=16, vocab_size=97, n_layer=2, n_head=2, n_embd=16, n_inner=24, norm='rmsnorm', mlp='swiglu', rope_theta=1e4,
                      bias=False, scheme='standard')
    save_checkpoint(['llama.pt'], dict(model=GPT(llama).state_dict(), config=vars(llama), meta=dict(encoding='unknown')))
    export('llama.pt', 'folder')

if __name__ == '__main__':
    names = [argument for argument in sys.argv[1:] if not argument.startswith('--tries=')]
    for argument in sys.argv[1:]:
        if argument.startswith('--tries='):
            TRIES = int(argument.removeprefix('--tries='))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        workshop()
        print(f'{"what":32}{"tried":>7}{"as it should be":>18}{"lost":>7}{"seconds":>10}')
        for row in ROWS:
            if not names or row.__name__ in names:
                began = time.time()
                chance.seed(row.__name__)       # a row is the same alone and among others
                tried, good = row()
                print(f'{row.__name__.replace("_", " "):32}{tried:>7}{good:>18}{tried - good:>7}{time.time() - began:>10.0f}', flush=True)
        os.chdir(ROOT)
