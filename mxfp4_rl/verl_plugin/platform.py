"""A CPU platform for verl, so that the whole training loop runs on a machine without an accelerator.

verl asks its platform for names that exist in `torch.cuda`; here they are answered by the CPU. It is chosen only where torch
has no accelerator build, so on a GPU host it stays dormant.
"""

import types
from contextlib import contextmanager

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry


class _CPUDeviceModule(types.ModuleType):
    """`torch.cpu` with the names of `torch.cuda` that verl uses; memory figures are the process's and the machine's."""

    def __getattr__(self, name):
        return getattr(torch.cpu, name)

    def is_available(self):
        return False  # verl then leaves its accelerator-only paths alone

    def get_device_name(self, device=None):
        return "CPU"

    def _nothing(self, *args, **kwargs):
        return None

    empty_cache = ipc_collect = set_device = synchronize = _nothing

    def memory_allocated(self, device=None):
        return psutil.Process().memory_info().rss

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self, device=None):
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """verl on CPUs: gloo for collectives, one logical "GPU" a worker for Ray's bookkeeping."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CPUDeviceModule("mxfp4_rl_cpu_device")

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return torch.version.cuda is None and torch.version.hip is None and not torch.cuda.is_available()

    def current_device(self):
        return torch.device("cpu")  # verl calls tensor.to(...) with it, where an index would mean an accelerator

    def device_count(self):
        return 1

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"  # the only resource that verl's pool manager counts, NPUs aside

    def ray_noset_envvars(self):
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self):
        return False

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def _nothing(self, *args, **kwargs):
        return None

    set_device = synchronize = set_allocator_settings = empty_cache = profiler_start = profiler_stop = cudart = _nothing
