"""The plugin that verl loads by entry point (group `verl.plugins`) at the end of `import verl`, in every process.

Kept light, since each of a run's processes pays for it: here only the CPU platform is registered, and hooks that register
our trainer and reward managers once verl's are imported. Engine and rollout follow in `mxfp4_rl.verl_plugin.register`, which
verl imports where they are needed (`actor_rollout_ref.model.external_lib`). verl swallows an exception raised here, so it
is reported first.
"""

import importlib
import sys


def _load_rewards(_verl_reward_managers) -> None:
    importlib.import_module("mxfp4_rl.verl_plugin.rewards")  # registers guarded twins


def _load_trainer(_verl_trainers) -> None:
    importlib.import_module("mxfp4_rl.verl_plugin.trainer")  # registers itself


try:
    import wrapt

    from mxfp4_rl.verl_plugin import platform as _platform  # noqa: F401  (registers itself)

    wrapt.register_post_import_hook(_load_trainer, "verl.trainer.ppo.v1")
    wrapt.register_post_import_hook(_load_rewards, "verl.experimental.reward_loop.reward_manager")
except Exception as error:
    print(f"[mxfp4] the verl plugin failed to load: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    raise
