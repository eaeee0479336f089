s = open('/tmp/m/snap/tests/benchmark.py').read()
def cut(a, b):
    global s
    i, j = s.index(a), s.index(b)
    part, s = s[i:j], s[:i] + s[j:]
    return part
t = cut('def timed(run)', 'def peak(run)')
p = cut('def stepper(', 'def main()')
s = s.replace('from torch.utils.flop_counter import FlopCounterMode\n', '')
s = s.replace('import time\n', '')
s = s.replace('import common, dpo, ppo, reward_model, sft  # noqa: E401, E402, I001\n', 'import common, dpo, reward_model, sft  # noqa: E401, E402, I001\nfrom benchmark_ppo import breakdown, growth, timed  # noqa: E402\n')
open('benchmark.py', 'w').write(s)
open('benchmark_ppo.py', 'w').write('''"""Parts 2 and 3 of benchmark.py: a PPO step part by part, and size by size."""

import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common, ppo  # noqa: E401, E402, I001
from common import Transformer  # noqa: E402


''' + t + p.rstrip() + '\n')
