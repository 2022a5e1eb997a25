"""Training in two processes (gloo), compared with training in one, and a training that is killed and resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from fresh_process import Forked, ranks
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


def training(
    folder,
    processes=1,
    padded=False,
    unequal=False,
    poisoned=False,
    resume=None,
    base="llama-tied",
    codes="stream",
    **arguments,
):
    """Returns the worker's settings of a training with 16 rows per step."""
    folder.mkdir(parents=True, exist_ok=True)
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 16 // processes // arguments.get("gradient_accumulation_steps", 1),
        "optim": "sgd",  # Adam would turn the rounding error of a zero gradient into a full step
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    data = {"padded": padded, "unequal": unequal, "poisoned": poisoned}
    return {"arguments": defaults | arguments, "resume": resume, "base": base, "codes": codes} | data


def launch(folder, trainings):
    """Runs trainings one after the other in two processes, as a user starts them."""
    (folder / "settings.json").write_text(json.dumps(trainings))
    # the training arguments put the processes on CPUs
    line = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    line += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    line += [str(WORKER), str(folder / "settings.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr[-3000:]


def start(folder, trainings, environments=({},)):
    """Starts a process per environment, which runs trainings one after the other."""
    settings = folder / "settings.json"
    settings.write_text(json.dumps(trainings))
    return [
        Forked(WORKER, folder, settings, output=folder / f"output-{rank}", environment=environment)
        for rank, environment in enumerate(environments)
    ]


def run(folder, *trainings):
    for process in start(folder, trainings):
        process.finish()


def run_sharded(folder, *trainings):
    """Runs trainings in two processes under FSDP2."""
    for process in start(folder, trainings, [rank | {"ACCELERATE_USE_FSDP": "true"} for rank in ranks(2)]):
        process.finish()


def result(folder):
    """Returns (logs, weights) of a training. Weights are None for a sharded training."""
    weights = folder / "weights.safetensors"
    return json.loads((folder / "logs.json").read_text()), load_file(weights) if weights.exists() else None


def in_this_process(folder, **settings):
    distributed_worker.run_training(training(folder, **settings))
    return result(folder)


LOSSES = {
    "five losses": {"padded": False, "alpha_start": 0.5, **FIVE},
    "padded": {"padded": True, "alpha_start": 0.5, "rate_floor": 1.0, "codes": "update", **FIVE},
    "model pass": {
        "padded": True, "alpha_start": 0.5, "lambda_stab": 0.1, "stability_strength": 0.0, "stability_fraction": 1.0,
        "stability_pass": "model",
    },
    "warm-up and accumulation": {"padded": False, "mfn_warmup": 2, "gradient_accumulation_steps": 2},
    "unequal ranks": {
        "padded": True, "unequal": True, "alpha_start": 0.5, "lambda_recon": 0.0, "lambda_util": 0.0,
        "lambda_aux": 0.0, "lambda_rate": 0.5, "lambda_comp": 50.0, "learning_rate": 0.5,
    },
    "nan in one process": {
        "padded": False, "poisoned": True, "skip_nonfinite_steps": 1, "alpha_start": 0.5, "rate_floor": 1.0,
    },
}  # fmt: skip
HALF_WAY = {"alpha_start": 0.5, "rate_floor": 1.0, "codes": "update", **FIVE}
# no gradient reaches a block's output in the warm-up and in the second pass
PAST_THE_OUTPUT = {"mfn_warmup": 2, "gradient_accumulation_steps": 2, "rate_floor": 1.0, **FIVE}
PAST_THE_OUTPUT |= {"stability_pass": "model"}
SHARDED = {"processes": 2, "fsdp": True, "fsdp_config": FSDP}
KEPT = HALF_WAY | SHARDED
KEPT |= {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Runs the trainings of LOSSES in two processes. Returns their folder, with a subfolder per name."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, [training(folder / name, processes=2, **settings) for name, settings in LOSSES.items()])
    return folder


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """Runs three trainings under FSDP2. Returns their folder, with a subfolder per name."""
    folder = tmp_path_factory.mktemp("sharded")
    run_sharded(
        folder,
        training(folder / "half way", **HALF_WAY, **SHARDED),
        training(folder / "past the output", **PAST_THE_OUTPUT, **SHARDED),
        training(folder / "kept", **KEPT),
    )
    return folder


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_have_the_losses_of_one(tmp_path, two_processes, name):
    (one, expected), (two, weights) = in_this_process(tmp_path, **LOSSES[name]), result(two_processes / name)
    assert len(one) == len(two) == 4
    for ours, theirs in zip(two, one, strict=True):
        assert set(ours) == set(theirs)
        of_features = "active_features" in theirs  # otherwise the step was left out
        assert of_features or name == "nan in one process"
        for part in set(PARTS) & set(theirs) if of_features else ():
            assert ours[part] == pytest.approx(theirs[part], rel=1e-5, abs=1e-6), part
    for parameter, tensor in expected.items():
        torch.testing.assert_close(weights[parameter], tensor, atol=1e-4, rtol=1e-4)


def test_fsdp2_trains_and_saves(tmp_path, two_shards):
    """Compares the losses of sharded training with those of one process, and loads the saved model."""
    (one, _), (two, _) = in_this_process(tmp_path, **HALF_WAY), result(two_shards / "half way")
    for ours, theirs in zip(two, one, strict=True):
        for name in PARTS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name
    model = MFNForCausalLM.from_pretrained(two_shards / "half way")
    assert model.config.auto_map["AutoModelForCausalLM"] == "mfn_for_causal_lm.MFNForCausalLM"
    assert (two_shards / "half way" / "mfn_for_causal_lm.py").exists()
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80), atol=1e-6, rtol=0)


def test_fsdp2_goes_on_from_a_checkpoint(tmp_path, two_shards):
    checkpoint = two_shards / "kept" / "checkpoint-2"
    run_sharded(tmp_path, training(tmp_path / "resumed", resume=str(checkpoint), **KEPT))
    (resumed, _), (whole, _) = result(tmp_path / "resumed"), result(two_shards / "kept")
    assert len(resumed) == len(whole) == 4  # the checkpoint holds the logs of the first two
    for ours, theirs in zip(resumed[2:], whole[2:], strict=True):
        for name in PARTS:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-6), name


def test_fsdp2_has_the_gradients_of_losses_that_go_past_the_output(tmp_path, two_shards):
    (one, _), (two, _) = in_this_process(tmp_path, **PAST_THE_OUTPUT), result(two_shards / "past the output")
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
    run(tmp_path, training(tmp_path / "whole", **settings))
    whole, weights = result(tmp_path / "whole")
    (process,) = start(tmp_path, [training(tmp_path / "killed", **settings)])
    until = time.time() + 200
    while not (tmp_path / "killed" / "checkpoint-6").exists() and time.time() < until:
        time.sleep(0.01)
    process.kill()  # possibly while a checkpoint is written
    assert not (tmp_path / "killed" / "logs.json").exists(), "it had finished before it was killed"
    run(tmp_path, training(tmp_path / "killed", resume=True, **settings))
    resumed, same = result(tmp_path / "killed")
    timing = ("epoch", "step", "train_runtime", "train_tokens_per_second")
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {n: v for n, v in ours.items() if n not in timing} == {
            n: v for n, v in theirs.items() if n not in timing
        }
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor)
