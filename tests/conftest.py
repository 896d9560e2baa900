import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))     # the root
torch.set_num_threads(1)                    # several would wait for one another: these models are small
os.environ['OMP_NUM_THREADS'] = '1'         # in the processes that tests start, too
