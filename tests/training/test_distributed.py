"""Training in two processes (gloo), against the same training in one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file

from modeling_mfn import MFNForCausalLM

WORKER = Path(__file__).parents[1] / "distributed_worker.py"
FIVE = {
    "lambda_rate": 0.02,
    "lambda_comp": 0.1,
    "lambda_stab": 0.1,
    "stability_fraction": 1.0,
    "stability_strength": 0.0,
}
PARTS = ("loss", "util_loss", "recon_loss", "rate_loss", "comp_loss", "stab_loss", "aux_loss", "active_features")
FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}


def command(folder, processes, padded=False, unequal=False, resume=None, base="llama-tied", **arguments):
    """The command line and environment of a training of 16 rows a step."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 16 // processes // arguments.get("gradient_accumulation_steps", 1),
        "optim": "sgd",  # Adam turns a gradient that is 0 but for rounding into a whole step
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    settings = {"arguments": defaults | arguments, "padded": padded, "unequal": unequal, "resume": resume, "base": base}
    (folder / "settings.json").write_text(json.dumps(settings))
    # with --cpu it starts one process alone, unless there is MPI; that the processes run on CPUs is in the arguments
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    launch += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": str("fsdp_config" in arguments).lower()}
    return [*launch, str(WORKER), str(folder / "settings.json")], environment


def train(folder, processes, **settings):
    """(logs, weights) of such a training."""
    line, environment = command(folder, processes, **settings)
    run = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    weights = folder / "weights.safetensors"
    return json.loads((folder / "logs.json").read_text()), load_file(weights) if weights.exists() else None


@pytest.mark.parametrize(
    "settings",
    [
        {"padded": False, "alpha_start": 0.5, **FIVE},
        {"padded": True, "alpha_start": 0.5, "rate_floor": 1.0, **FIVE},
        {"padded": True, "alpha_start": 0.5, "lambda_stab": 0.1, "stability_strength": 0.0, "stability_fraction": 1.0,
         "stability_pass": "model"},
        {"padded": False, "mfn_warmup": 2, "gradient_accumulation_steps": 2},
        {"padded": True, "unequal": True, "alpha_start": 0.5, "lambda_recon": 0.0, "lambda_util": 0.0,
         "lambda_aux": 0.0, "lambda_rate": 0.5, "lambda_comp": 50.0, "learning_rate": 0.5},
    ],
    ids=["five losses", "padded", "model pass", "warm-up and accumulation", "unequal ranks"],
)  # fmt: skip
def test_two_processes_have_the_losses_of_one(tmp_path, settings):
    (one, expected), (two, weights) = (train(tmp_path / str(n), n, **settings) for n in (1, 2))
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        for name in set(PARTS) & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-4)


def test_fsdp2_trains_saves_and_loads(tmp_path):
    """Sharded parameters: the losses of one process, a model that loads, and a run that goes on from a checkpoint."""
    settings = {"alpha_start": 0.5, "rate_floor": 1.0, **FIVE}
    sharded = settings | {"fsdp": True, "fsdp_config": FSDP}
    (one, _), (two, _) = train(tmp_path / "one", 1, **settings), train(tmp_path / "two", 2, **sharded)
    for ours, theirs in zip(two, one, strict=True):
        for name in PARTS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    model = MFNForCausalLM.from_pretrained(tmp_path / "two")
    assert model.config.auto_map["AutoModelForCausalLM"] == "modeling_mfn.MFNForCausalLM"
    assert (tmp_path / "two" / "modeling_mfn.py").exists()
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)

    sharded |= {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole, _ = train(tmp_path / "whole", 2, **sharded)
    resumed, _ = train(tmp_path / "resumed", 2, resume=str(tmp_path / "whole" / "checkpoint-2"), **sharded)
    assert len(resumed) == len(whole) == 4  # those of the steps before came with the checkpoint
    for ours, theirs in zip(resumed[2:], whole[2:], strict=True):
        for name in PARTS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


def test_fsdp2_has_the_weights_of_losses_that_go_past_the_output(tmp_path):
    """In a warm-up and in the second pass, no gradient arrives at a block's output."""
    settings = {"mfn_warmup": 2, "gradient_accumulation_steps": 2, "rate_floor": 1.0, **FIVE, "stability_pass": "model"}
    one, _ = train(tmp_path / "one", 1, **settings)
    two, _ = train(tmp_path / "two", 2, fsdp=True, fsdp_config=FSDP, **settings)
    assert ["util_loss" in step for step in one] == [False, False, True, True]
    for ours, theirs in zip(two, one, strict=True):
        for name in {*PARTS, "grad_norm"} & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    "file", sorted((WORKER.parent.parent / "examples" / "accelerate").glob("*.yaml")), ids=lambda f: f.stem
)
def test_accelerate_reads_the_configurations(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type == {"fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}.get(file.stem, "MULTI_GPU")


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    settings = {"max_steps": 30, "save_strategy": "steps", "save_steps": 3, "rate_floor": 1.0, **FIVE}
    whole, weights = train(tmp_path / "whole", 1, **settings)
    line, environment = command(tmp_path / "killed", 1, **settings)
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    until = time.time() + 200
    while not (tmp_path / "killed" / "checkpoint-6").exists() and time.time() < until:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # in the middle of a checkpoint, as likely as not
    process.communicate()
    assert not (tmp_path / "killed" / "logs.json").exists(), "it had finished before it was killed"
    resumed, same = train(tmp_path / "killed", 1, resume=True, **settings)
    timing = ("epoch", "step", "train_runtime", "train_tokens_per_second")
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {n: v for n, v in ours.items() if n not in timing} == {
            n: v for n, v in theirs.items() if n not in timing
        }
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor)
