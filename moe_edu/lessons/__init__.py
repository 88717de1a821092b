"""What the notebooks need beyond the package: their start, their parameters, live pictures, the translation box."""

from moe_edu.system.requirements import require_all

require_all()  # before imports that would fail one by one

from moe_edu.data.corpus import choose_phrases  # noqa: E402
from moe_edu.lessons.live import LiveTraining  # noqa: E402
from moe_edu.lessons.notebook import begin, check_parameters, claim, show  # noqa: E402
from moe_edu.lessons.translate_box import translate_box  # noqa: E402

__all__ = ["LiveTraining", "begin", "check_parameters", "choose_phrases", "claim", "show", "translate_box"]
