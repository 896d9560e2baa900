"""
What may break, broken on purpose, from a fixed seed:  python tests/faults.py  (half an hour on one core)

    python tests/faults.py kill_train command_lines         # some of the rows
    python tests/faults.py --tries=100                      # instead of 30

Each row of the table says how often something was tried, and how often the outcome was as it should be. A run
that is killed and resumed ends in the weights of an uninterrupted one, bit for bit. Damage is noticed, or has
changed nothing that is read. A program that gives up says why in one sentence, and changes no file. Linux.
"""
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
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
os.environ.update(OMP_NUM_THREADS='1', HF_ENDPOINT='http://127.0.0.1:9')    # before torch: one thread, no hub

import torch

from configurator import explain
from data.download import publish_dataset
from export import export
from model import GPT, GPTConfig
from pretrained import build, tokenizer
from runtime import load_checkpoint, open_data, save_checkpoint
from test_scripts import command

TRIES = 30
BOTH = dict(dataset='tiny', block_size=16, batch_size=4, gradient_accumulation_steps=2, eval_windows=9,
            device='cpu', warmup_iters=1, max_iters=60, eval_interval=3, log_interval=1)
TRAIN = dict(BOTH, n_layer=3, n_head=2, n_embd=16, dropout=0.1)
RETROFIT = dict(BOTH, teacher='sound.pt', bits=1.5, spread_windows=2)
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run']
PREPARE = [sys.executable, 'data/python/prepare.py']
QUIET = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
chance = random.Random(0)

def run(arguments, **how):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **how)

def says_why(result):
    """Whether a process gave up with a sentence. Python has status 120 if it cannot write at its end."""
    return result.returncode == 1 and 'Traceback' not in result.stderr and bool(result.stderr.strip())

def same_weights(one, other):
    """Of the last.pt in two folders."""
    one, other = (load_checkpoint(f'{folder}/last.pt')['model'] for folder in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

# -----------------------------------------------------------------------------
# killed, and resumed

def killed(start, longest):
    """Starts a process, and kills it and its children at a random moment. Was it still at work?"""
    with subprocess.Popen(start, **QUIET, start_new_session=True) as process:
        time.sleep(chance.uniform(0.2, longest))
        alive = process.poll() is None
        everyone = [str(process.pid), *descendants(process.pid)]    # torchrun's have sessions of their own
        run(['kill', '-KILL', *everyone])
    while set(run(['ps', '-o', 'state=', '-p', ','.join(everyone)]).stdout.split()) - {'Z'}:
        time.sleep(0.05)
    return alive

def children(pid):
    return run(['pgrep', '-P', str(pid)]).stdout.split()

def descendants(pid):
    return [x for child in children(pid) for x in (child, *descendants(child))]

def kill_and_resume(script, flags, processes=1):
    """Each kill is a try. All are lost if the run does not end in the weights of an undisturbed one."""
    def disturbed():
        first = 'scratch' if script == 'train.py' else 'teacher'
        init_from = 'resume' if Path('disturbed/last.pt').exists() else first
        return command(script, processes, out_dir='disturbed', init_from=init_from, **flags)

    began = time.time()
    assert run(command(script, processes, out_dir='undisturbed', **flags)).returncode == 0
    longest = time.time() - began
    kills = 0
    while kills < TRIES:
        shutil.rmtree('disturbed', ignore_errors=True)
        while kills < TRIES and killed(disturbed(), longest):
            kills += 1
        if run(disturbed()).returncode or not same_weights('disturbed', 'undisturbed'):
            return TRIES, 0
    return TRIES, TRIES

def kill_train():
    return kill_and_resume('train.py', TRAIN)

def kill_train_of_two_processes():
    return kill_and_resume('train.py', TRAIN, processes=2)

def kill_train_of_two_processes_with_shards():
    return kill_and_resume('train.py', dict(TRAIN, shard=True), processes=2)

def kill_train_that_lands():
    return kill_and_resume('train.py', dict(TRAIN, scheme='midpoint_a', a=-1, h='once', land_part=0.8))

def kill_retrofit():
    return kill_and_resume('retrofit.py', RETROFIT)

def kill_prepare():
    """A kill leaves no data set, or all of it. The next run makes all of it."""
    def files():
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'prepare.py'}

    folder = Path('data/python')
    good = 0
    assert run(PREPARE).returncode == 0
    undisturbed = files()
    for _ in range(TRIES):
        killed(PREPARE, 1.5)
        left = files()
        whole = left.get('meta.json', b'{}') == b'{}' or left | undisturbed == left
        good += whole and run(PREPARE).returncode == 0 and files() == undisturbed
    return TRIES, good

def kill_download():
    """A file of 2 MB from a slow server, fetched by as many processes as it takes."""
    content = chance.randbytes(2_000_000)
    lost = 0                                # what a kill has lost shows when the file is complete

    class Slow(BaseHTTPRequestHandler):
        def do_GET(self):
            first = int(self.headers.get('Range', 'bytes=0-').split('=')[1].split('-')[0])
            self.send_response(206 if first else 200)
            if first:
                self.send_header('Content-Range', f'bytes {first}-{len(content) - 1}/{len(content)}')
            self.send_header('Content-Length', str(len(content) - first))
            self.end_headers()
            for i in range(first, len(content), 1 << 16):
                self.wfile.write(content[i:i + (1 << 16)])
                time.sleep(0.02)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Slow)
    server.handle_error = lambda *_: None   # those that are killed do not listen
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/file'
    fetch = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(ROOT)!r})\n'
             f'from data.download import download; download({url!r}, "fetched/file")']
    for _ in range(TRIES):
        killed(fetch, 1.5)
        if Path('fetched/file').exists() or chance.random() < 0.3:
            run(fetch)
            lost += Path('fetched/file').read_bytes() != content
            shutil.rmtree('fetched')
    server.shutdown()
    return TRIES, TRIES - lost

# -----------------------------------------------------------------------------
# no room

def small_files(limit):
    """No file may grow beyond so many bytes at most, as on a disk that is full."""
    size = chance.randrange(limit)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def full_disk(script, flags, *again):
    start = command(script, out_dir='crowded', **flags)
    good = 0
    last = Path('crowded/last.pt')
    for _ in range(TRIES // 3):
        shutil.rmtree('crowded', ignore_errors=True)
        assert run([*start, '--max_iters=3']).returncode == 0
        before = last.read_bytes()
        result = run([*start, *again], preexec_fn=small_files(len(before)))
        half = list(Path('crowded').glob('*.pt.part'))
        good += says_why(result) and last.read_bytes() == before and not half
    return TRIES // 3, good

def full_disk_train():
    return full_disk('train.py', dict(TRAIN, max_iters=6, lr_decay_iters=9), '--init_from=resume')

def full_disk_retrofit():
    return full_disk('retrofit.py', RETROFIT)

def full_disk_prepare():
    results = [run(PREPARE, preexec_fn=small_files(5_000_000)) for _ in range(TRIES // 3)]
    return len(results), sum(map(says_why, results))

def full_disk_of_any_file():
    """What each script prints; an export, and the tables of evaluate.py and bench.py."""
    scripts = [command(script, **flags) for script, flags in SCRIPTS.items()]
    bench = command('bench.py') + 'depth --cases=leapfrog --layers=[1] --n_embd=32 --block_size=16'.split()
    convert = [*command('export.py'), 'sound.pt']
    printing = [*scripts, bench, PREPARE]
    with open('/dev/full', 'w') as full:
        how = dict(stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
        good = sum(says_why(subprocess.run(arguments, **how)) for arguments in printing)
    writing = [([*convert, 'exported'], 'exported', 10000), ([*convert, 'exported.pt'], 'exported.pt', 10000),
               ([*scripts[-1], '--json=table.json'], 'table.json', 50),
               ([*bench, '--json=bench.json'], 'bench.json', 200)]
    for arguments, target, most in writing:
        result = run(arguments, preexec_fn=small_files(most))
        path = Path(target)                 # not there, or empty as it was before the first row
        good += says_why(result) and (not path.exists() or path.is_file() and path.stat().st_size in (0, 2))
    return len(printing) + len(writing), good

# -----------------------------------------------------------------------------
# damage

def damage(path, use, flipped=None):
    """
    Flips a bit in the first `flipped` bytes of the file (None: in all of it, 0: never), or cuts it off. use()
    must end in a sentence, or give what it gave before.
    """
    sound = use()

    def compare():
        if use() != sound:
            raise ValueError('other numbers')

    content = path.read_bytes()
    flipped = len(content) if flipped is None else flipped
    good = 0
    for k in range(10 * TRIES):
        damaged = bytearray(content)
        if k % 5 == 0 or not flipped:
            del damaged[chance.randrange(len(content)):]
        else:
            damaged[chance.randrange(flipped)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        code, said = in_a_child(compare)
        good += code == 0 or code == 1 and 'Traceback' not in said and 'other numbers' not in said
    path.write_bytes(content)
    return 10 * TRIES, good

def in_a_child(work, seconds=60):
    """(exit status, what it wrote) of a forked process with 8 GB of memory. It has torch already."""
    with tempfile.TemporaryFile('w+') as output:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            sys.stdout = sys.stderr = open(output.fileno(), 'w', closefd=False)
            sys.excepthook = explain
            status = 0
            try:
                resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
                signal.alarm(seconds)
                work()
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

    return damage(Path('sound.pt'), use)

def damaged_data():
    def use():
        meta, train, val = open_data(SimpleNamespace(dataset='tiny', block_size=16))
        return train.tobytes(), val.tobytes(), meta['encoding'], meta['vocab_size'], meta['dtype']

    results = [damage(Path('data/tiny', name), use) for name in ('train.bin', 'val.bin', 'meta.json')]
    return tuple(map(sum, zip(*results)))

def damaged_safetensors():
    """Bits are flipped in the header alone: the format has no checksums of the weights."""
    def use():
        return [weight.tolist() for weight in build('folder')[0].state_dict().values()]

    path = Path('folder/model.safetensors')
    return damage(path, use, flipped=8 + int.from_bytes(path.read_bytes()[:8], 'little'))

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
        return tokenizer(dict(encoding='tokenizer.json', model='folder', vocab_size=5))[0]('to be')

    return damage(path, use, flipped=0)

# -----------------------------------------------------------------------------
# what is typed

VALUES = r"""0 -1 1 2 3 7 16 10**9 1000000000 -0.5 0.5 1e-3 nan inf -inf 1e400 None True False [] [1] {} () ""
    [0.5,0.5] [1,"a"] abc auto random all cpu cuda mps float32 bfloat16 float16 resume scratch standard
    leapfrog midpoint symplectic midpoint_a midpoint_sum gpt2 tiny none sound.pt folder data / .. é ' \ --
    = 2**63 9223372036854775807 9223372036854775808 -9223372036854775809""".split() + ['']
SCRIPTS = {'train.py': dict(TRAIN, max_iters=1, out_dir='typed'),
           'retrofit.py': dict(RETROFIT, max_iters=1, out_dir='typed'),
           'sample.py': dict(init_from='sound.pt', max_new_tokens=3),
           'evaluate.py': dict(init_from='sound.pt', datasets='tiny', block_size=16, eval_windows=4)}
ENDLESS = ('max_iters max_new_tokens num_samples batch_size gradient_accumulation_steps eval_windows '
           'spread_windows warmup_iters').split()           # if they are large

def command_lines():
    """One to three flags with values of any kind; sometimes a misspelt name, or a word that is no flag."""
    good = 0
    for _ in range(10 * TRIES):
        script = chance.choice(list(SCRIPTS))
        names = re.findall(r'^    (\w+): .* = ', (ROOT / script).read_text(), re.MULTILINE)
        flags = dict(SCRIPTS[script])
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(names) if chance.random() < 0.95 else 'misspelt'
            flags[name] = chance.choice(['typed', 'sound.pt/x'] if name in ('out_dir', 'json') else VALUES)
        more = chance.choice([[]] * 20 + [['word'], ['--'], ['-x'], ['--seed']])
        line = command(script, **flags)[1:] + more

        def work():
            sys.argv = line
            runpy.run_path(line[0], run_name='__main__')

        code, said = in_a_child(work, seconds=30)
        slow = 'compile' in flags or any(len(str(flags.get(name))) > 9 for name in ENDLESS)
        fine = (code in (0, 1) or slow and code == -signal.SIGALRM) and 'Traceback' not in said
        if not fine:
            print(f'{" ".join(line)}: {code} {said[-300:]}', file=sys.stderr)
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

    torch.save(dict(model={}, config={}, meta=Malice()), 'malice.pt')
    with zipfile.ZipFile('bomb.pt', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', bytes(1 << 28))        # 256 MB of zeros, which shrink to 256 kB
    Path('code.py').write_text('__import__("os").mkdir("executed")\n')
    shutil.copytree('folder', 'outside', dirs_exist_ok=True)
    os.remove('outside/model.safetensors')
    index = dict(weight_map={'wte.weight': '../folder/model.safetensors'})
    Path('outside/model.safetensors.index.json').write_text(json.dumps(index))
    tries = [(load_checkpoint, 'malice.pt'), (load_checkpoint, 'bomb.pt'), (build, 'malice.pt'),
             (build, 'bomb.pt'), (build, 'outside')]
    good = 0
    for use, path in tries:
        code, said = in_a_child(lambda: use(path), seconds=20)
        good += code == 1 and 'Traceback' not in said
    good += says_why(run([*command('train.py', **SCRIPTS['train.py']), 'code.py']))
    return len(tries) + 1, good * (not Path('executed').exists())

def without_end(out_dir, processes=1):
    """Such a run of train.py."""
    start = command('train.py', processes, **dict(TRAIN, max_iters=10**6, out_dir=out_dir))
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def wait_for(step, process):
    next(line for line in process.stdout if line.startswith(f'step {step}: loss'))

def kill_one(group):
    os.kill(int(chance.choice(children(group.pid))), signal.SIGKILL)

def two_runs_in_one_folder():
    with without_end('shared') as first:
        wait_for(1, first)
        second = run(command('train.py', out_dir='shared', **TRAIN))
        first.terminate()
        first.communicate()
    return 1, int(says_why(second) and 'in use by another run' in second.stderr and first.returncode == 0)

def a_process_of_two_dies():
    """The other ends within a minute, with a sentence; so does torchrun."""
    good = 0
    for _ in range(TRIES // 10):
        with without_end('widowed', processes=2) as group:
            wait_for(5, group)
            kill_one(group)
            began = time.time()
            said = group.communicate(timeout=120)[1]        # reads on: a closed pipe would be another fault
        soon = group.returncode != 0 and time.time() - began < 60
        good += soon and 'Signal 9' in said and 'has lost the others' in said
    return TRIES // 10, good

LACKING = f"""
import os, runpy, model, torch
end = model.Tape.end
passes = []

def lacking(tape):
    passes.append(end(tape))
    if os.environ['RANK'] == '1' and len(passes) == int(os.environ['PASSES']):
        raise torch.OutOfMemoryError('CUDA out of memory')

model.Tape.end = lacking
runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')
"""

def out_of_memory_in_one_of_two():
    """A process runs out of memory in a random backward pass, and says so. The other ends within a minute."""
    Path('lacking.py').write_text(LACKING)
    start = command(os.path.abspath('lacking.py'), 2, **dict(TRAIN, max_iters=10**6, out_dir='lacking'))
    good = 0
    for _ in range(TRIES // 10):
        began = time.time()
        result = run(start, env=dict(os.environ, PYTHONPATH=str(ROOT), PASSES=str(chance.randrange(1, 9))))
        good += result.returncode != 0 and time.time() - began < 90 and 'out of memory: try' in result.stderr
    return TRIES // 10, good

def two_machines():
    """Two groups of processes that meet at an address end in the weights of one group of two, bit for bit."""
    flags = dict(TRAIN, max_iters=12)
    assert run([*command('train.py', 2, **flags), '--out_dir=one_machine']).returncode == 0
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    start = [*TORCHRUN, '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d', '--rdzv_id=two',
             f'--rdzv_endpoint=127.0.0.1:{port}', *command('train.py', **flags)[1:], '--out_dir=two_machines']
    machines = [subprocess.Popen(start, **QUIET) for _ in range(2)]
    codes = [machine.wait(timeout=300) for machine in machines]
    return 1, int(codes == [0, 0] and same_weights('one_machine', 'two_machines'))

def restarts_go_on(**flags):
    """torchrun --max_restarts=2, whose processes are killed twice on the way."""
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # or a restart may fail: pytorch issue 135712
    start = [*TORCHRUN, '--nnodes=1', '--nproc_per_node=2', '--max_restarts=2', '--monitor_interval=0.5',
             '--rdzv_backend=c10d', '--rdzv_endpoint=127.0.0.1:0', f'--rdzv_id={chance.random()}',
             *command('train.py', **dict(TRAIN, max_iters=300, eval_interval=20, **flags))[1:]]
    assert run([*start, '--out_dir=calm']).returncode == 0
    start.append('--out_dir=restless')
    good = 0
    for _ in range(TRIES // 10):
        shutil.rmtree('restless', ignore_errors=True)
        with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as group:
            for step in (100, 200):
                wait_for(step, group)
                kill_one(group)
            group.communicate()
        good += group.returncode == 0 and same_weights('calm', 'restless')
    return TRIES // 10, good

def restarts_go_on_with_shards():
    return restarts_go_on(shard=True)

def training_that_cannot_go_on():
    """Weights of NaN or inf, or that push states beyond the integers; data that are wrong, none, others."""
    def refused(words, *flags):
        before = last.read_bytes()
        result = run([*start, '--init_from=resume', *flags])
        return says_why(result) and words in result.stderr and last.read_bytes() == before

    last = Path('begun/last.pt')
    start = command('train.py', **dict(TRAIN, out_dir='begun', max_iters=6, lr_decay_iters=9))
    assert run([*start, '--max_iters=3']).returncode == 0
    sound = load_checkpoint(last)
    weight = 'transformer.h.0.mlp.c_proj.weight'
    factors = [float(factor) for factor in ('nan', 'inf', '-inf', '1e13')]
    good = 0
    for factor in factors:
        model = sound['model'] | {weight: factor * sound['model'][weight]}
        save_checkpoint([last], dict(sound, model=model))
        good += refused('loss is nan')
    save_checkpoint([last], sound)
    data = {bytes([200]) * 3000: 'not as it was prepared', b'': 'no data', bytes(3000): 'seen other tokens'}
    for content, words in data.items():
        dataset('strange', content, vocab_size=100)
        good += refused(words, '--dataset=strange')
    return len(factors) + len(data), good

ROWS = [kill_train, kill_train_of_two_processes, kill_train_of_two_processes_with_shards,
        kill_train_that_lands, kill_retrofit, kill_prepare, kill_download, full_disk_train,
        full_disk_retrofit, full_disk_prepare, full_disk_of_any_file, training_that_cannot_go_on,
        damaged_checkpoint, damaged_data, damaged_safetensors, damaged_tokenizer, command_lines,
        hostile_files, two_runs_in_one_folder, a_process_of_two_dies, out_of_memory_in_one_of_two,
        two_machines, restarts_go_on, restarts_go_on_with_shards]

def dataset(name, content, vocab_size):
    folder = Path('data', name)
    folder.mkdir(exist_ok=True)
    (folder / 'train.bin.part').write_bytes(content)
    (folder / 'val.bin.part').write_bytes(bytes(i * i % 61 for i in range(400)))
    with redirect_stdout(None):
        publish_dataset(folder, encoding='bytes', vocab_size=vocab_size, dtype='uint8')

def checkpoint(path, meta, **fields):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=256, n_layer=3, n_head=2, n_embd=16, bias=False)
    config = dict(shape, scheme='standard', **fields)
    save_checkpoint([path], dict(model=GPT(GPTConfig(**config)).state_dict(), config=config, meta=meta))

def workshop():
    """Fills the current folder with data and a model in each kind of file."""
    for file in ('data/python/prepare.py', 'data/download.py', 'configurator.py'):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, file)
    dataset('tiny', bytes(i * i % 61 for i in range(3000)), vocab_size=256)
    checkpoint('sound.pt', dict(encoding='bytes', vocab_size=256))
    checkpoint('llama.pt', dict(encoding='unknown'), n_inner=24, norm='rmsnorm', mlp='swiglu', rope_theta=1e4)
    export('llama.pt', 'folder')

if __name__ == '__main__':
    names = sys.argv[1:]
    if names and names[-1].startswith('--tries='):
        TRIES = int(names.pop().removeprefix('--tries='))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        workshop()
        print(f'{"what":32}{"tried":>7}{"as it should be":>18}{"lost":>7}{"seconds":>10}')
        for row in ROWS:
            if not names or row.__name__ in names:
                began = time.time()
                chance.seed(row.__name__)   # a row is the same alone and among others
                tried, good = row()
                what = row.__name__.replace('_', ' ')
                seconds = round(time.time() - began)
                print(f'{what:32}{tried:>7}{good:>18}{tried - good:>7}{seconds:>10}', flush=True)
