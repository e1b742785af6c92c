"""Defenses of several stages together: two in one class, and the study of both methods."""

from pathlib import Path

import lightning as L
import torch
import yaml
from test_study import cells, read_study, resolve, resolved
from toy import DEFENSES, toy_data, toy_trainer

from casehard import Optimizer, SafeLoRAModule, SBRModule
from casehard.engine.weights import snapshot
from casehard.lightning_modules.defense import Defense


class Both(SBRModule, SafeLoRAModule):
    """SBR holds the anchors of a customer's job, SafeLoRA repairs what the job has made of the weights."""


def trained(module: Defense, folder: Path) -> Defense:
    L.seed_everything(0)
    toy_trainer(folder, max_steps=3).fit(module, datamodule=toy_data())
    return module


def test_two_defenses_in_one_class_act_one_after_the_other(checkpoint, tmp_path):
    base, settings = str(Path(checkpoint).with_name("base")), DEFENSES["sbr_own"][1] | {"optimizer": Optimizer(1e-2)}
    both = Both(checkpoint, base=base, num_layers=5, **settings)
    assert (both.stage, both.adaptive) == ("finetuning+post_finetuning", "attack/adaptive/sbr")
    both = trained(both, tmp_path / "both")
    held = trained(SBRModule(checkpoint, **settings), tmp_path / "held")
    assert not all(torch.equal(a, b) for a, b in zip(both.parameters(), held.parameters(), strict=True))
    repair = SafeLoRAModule(checkpoint, base, num_layers=5)
    repair.configure_model()
    start = snapshot(repair)
    repair.model.load_state_dict(held.model.state_dict())
    repair.recover(start)
    assert all(torch.equal(a, b) for a, b in zip(both.parameters(), repair.parameters(), strict=True))


def test_the_study_of_both_methods_gives_every_arm_the_same_customers(tmp_path):
    study = read_study("experiments/studies/together.yaml")
    found = [c for c in cells(study, tmp_path, resolve) if c.attack and c.seed == 0]
    assert len(found) == 6 * 3
    for attack in study.attacks:
        configs = [yaml.safe_load(resolved(c.words)) for c in found if c.attack == attack]
        jobs = [(c["trainer"]["callbacks"], c["data"]["sources"], c["data"]["evaluation"]) for c in configs]
        assert all(job == jobs[0] for job in jobs)
