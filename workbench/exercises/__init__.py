"""Exercises of the notebooks, with a hint for each typical mistake and never the answer.

`questions` has them all (those on the frontier come from `frontier`), `record` says what one is, `verdict` compares an answer.
"""

from workbench.exercises.questions import EXERCISES as EXERCISES
from workbench.exercises.record import Exercise as Exercise
from workbench.exercises.record import Mistake as Mistake
from workbench.exercises.verdict import Verdict as Verdict
from workbench.exercises.verdict import check as check
from workbench.exercises.verdict import exercise_named as exercise_named
