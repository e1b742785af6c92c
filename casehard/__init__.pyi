from casehard.callbacks.attacks import FullParameterAttack as FullParameterAttack
from casehard.callbacks.attacks import LoRAAttack as LoRAAttack
from casehard.callbacks.results import Results as Results
from casehard.callbacks.scoring import Evaluate as Evaluate
from casehard.cli.main import main as main
from casehard.datamodules.sandbox_judge import SandboxJudge as SandboxJudge
from casehard.datamodules.sft import SFTDataModule as SFTDataModule
from casehard.engine.adapters import LoRA as LoRA
from casehard.engine.optimizer import Optimizer as Optimizer
from casehard.lightning_modules.defense import Defense as Defense
from casehard.lightning_modules.patcher import InnerAttacker as InnerAttacker
from casehard.lightning_modules.patcher import PatcherModule as PatcherModule
from casehard.lightning_modules.roles import RolesStrategy as RolesStrategy
from casehard.lightning_modules.sbr import SBRModule as SBRModule
from casehard.metrics.errors import SettingError as SettingError
from casehard.metrics.harmful_score import AttackSuccessRate as AttackSuccessRate
from casehard.metrics.harmful_score import FinetuneAccuracy as FinetuneAccuracy
from casehard.metrics.harmful_score import HarmfulScore as HarmfulScore
from casehard.metrics.harmful_score import RefusalRate as RefusalRate
from casehard.metrics.judges import Judge as Judge
from casehard.metrics.judges import Verdict as Verdict
from casehard.metrics.local_judges import GuardJudge as GuardJudge
from casehard.metrics.local_judges import ModerationJudge as ModerationJudge
from casehard.metrics.local_judges import StrongRejectJudge as StrongRejectJudge
from casehard.metrics.refusal_phrases import RefusalPhraseJudge as RefusalPhraseJudge
from casehard.metrics.rubric_judge import RubricJudge as RubricJudge

__all__: list[str]
