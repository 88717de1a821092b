"""What the notebooks need beyond the package: their start, their parameters, live pictures, the box to translate in."""

from moe_edu.lessons.live import LiveTraining, choose_phrases
from moe_edu.lessons.notebook import begin, check_parameters, claim, show
from moe_edu.lessons.translate_box import translate_box

__all__ = ["LiveTraining", "begin", "check_parameters", "choose_phrases", "claim", "show", "translate_box"]
