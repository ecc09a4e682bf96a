"""The table of a comparison that takes seconds."""

from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "recipe": "analytic_ties",
    "baseline": "dmd",
    "guidance": [1.0],
    "budgets": [2, 3],
    "seeds": [1, 2],
    "tuning_seeds": [0],
    "metrics": ["tau_err", "w1"],
    "samples": 16,
    "settings": {"batch_size": 4, "num_captions": 8, "save_every_iterations": 4, "log_every_iterations": 4},
    "arms": {
        "truth": {"kind": "truth"},
        "teacher_4": {"kind": "teacher", "steps": 4},
        "start_network": {"kind": "start"},
        "dmd": {"method": "dmd"},
        "codmd": {"method": "codmd"},
    },
    "start": {
        "arms": ["dmd"],
        "settings": {"start.updates": 2, "start.paths": 4, "start.teacher_steps": 3},
        "unequal": "paths of the teacher",
    },
}
