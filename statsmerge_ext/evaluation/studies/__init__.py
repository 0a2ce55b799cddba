"""Studies: how merges of a suite fare as one thing changes: samples, tasks, corruption, statistics, labels, storage.

A study is a list of cases, each one merge and what it is tested on (cases.py). What was measured is kept record by
record in one file a suite, so that a study that was interrupted goes on where it was, and studies that merge the same
model measure it once (running.py). Tables and plots are made from the records (report.py).
"""

from statsmerge_ext.evaluation.studies.cases import STUDIES, Case, Study, get_study
from statsmerge_ext.evaluation.studies.report import plot_study, study_table, whole_parts
from statsmerge_ext.evaluation.studies.running import Records, run_study

__all__ = ["STUDIES", "Case", "Records", "Study", "get_study", "plot_study", "run_study", "study_table", "whole_parts"]
