"""Exercises of the course: their shape, their versions, and that a check fails without its solution.

Two chapters run here. All of them: `pytest -m slow tests/project/test_exercises.py`, some five minutes of one core.
"""
import ast
import json
import re
import textwrap

import pytest
from reading import COURSE, INDEX, LONGEST, NBS, counts, course, exact_minutes, map_rows, parts
from support import ROOT

from mae_nb.tasks.course import CODE_STUB, POINTS, TEXT_STUB, cell_text, course_pages, find_exercises, write_course

PAGES = [page for page in course_pages(NBS) if find_exercises(json.loads((NBS/page).read_text())['cells'])]
CHAPTERS = [page for page in PAGES if page != 'course/projects.ipynb']
SAMPLE = 'model/02_positions.ipynb', 'model/06_decoder.ipynb'   # the quickest
KERNEL = pytest.mark.parametrize('page', [page if page in SAMPLE else pytest.param(page, marks=pytest.mark.slow)
                                          for page in PAGES])


def cells(file):
    return json.loads(file.read_text())['cells']


def notebook(file):
    "As Jupyter reads it."
    import nbformat  # slow to import: its schema's checker of addresses builds a parser
    return nbformat.read(file, 4)


@pytest.fixture(scope='module')
def versions(tmp_path_factory):
    "Both versions of the whole course, in folders named after them."
    folder = tmp_path_factory.mktemp('course')
    for version in ('student', 'teacher'):
        write_course(version, folder/version, NBS)
    return folder


# ---- the source ----------------------------------------------------------------------------------------------------

def test_the_course_has_exercises_in_each_chapter():
    text = next(cell_text(c) for c in cells(INDEX) if '### The course' in cell_text(c))
    assert CHAPTERS == list(map_rows(course(text)))


@pytest.mark.parametrize('page', CHAPTERS)
def test_a_chapter_has_three_to_six_exercises_of_all_kinds(page):
    exercises = find_exercises(cells(NBS/page))
    assert 3 <= len(exercises) <= 6
    assert [e.number for e in exercises] == [*range(1, len(exercises) + 1)]
    assert {e.kind for e in exercises} == {*POINTS}


@pytest.mark.parametrize('page', PAGES)
def test_a_question_does_not_contain_its_answer(page):
    chapter = cells(NBS/page)
    for exercise in find_exercises(chapter):
        question = cell_text(chapter[exercise.question])
        assert '*Answer.*' not in question and 'BEGIN SOLUTION' not in question
        assert exercise.minutes > 0 and len(exercise.note.split()) >= 3


def test_each_marker_belongs_to_an_exercise():
    "Nothing between the markers is left over where no exercise is found, in the course or elsewhere."
    for file in sorted(NBS.glob('*/*.ipynb')):
        chapter = cells(file)
        marked = {i for i, cell in enumerate(chapter)
                  if re.search(r'^ *### (BEGIN|END) SOLUTION$', cell_text(cell), re.M)
                  and not cell_text(cell).startswith(('#| export', 'def text_cell'))}
        if marked:
            assert marked == {e.answer for e in find_exercises(chapter) if e.kind != 'Think'}, file.name


# ---- what a blank takes away ---------------------------------------------------------------------------------------

def bound(code: str) -> set:
    "Names that code binds at its top level."
    names, waiting = set(), [ast.parse(code)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split('.')[0] for alias in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            waiting += ast.iter_child_nodes(node)
    return names


def read(code: str) -> set:
    "Names that code reads anywhere."
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


def raising(code: str) -> set:
    "Functions and classes with a blank inside."
    return {node.name for node in ast.parse(code).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and 'NotImplementedError' in ast.unparse(node)}


def needs_the_solution(before: str, solution: str, blank: str, checks: str) -> bool:
    "Whether checks read a name that only the solution binds, or that raises without it."
    missing = bound(solution) - bound(before)
    return bool(read(checks) & (missing | raising(blank)))


def place_of(cell) -> str:
    "Which part of which exercise a cell of a version is: 'masking-2-check1', or nothing."
    return cell['metadata'].get('nbgrader', {}).get('grade_id', '')


@pytest.mark.parametrize('page', PAGES)
def test_checks_read_what_only_the_solution_gives(page, versions):
    student, teacher = (cells(versions/version/page) for version in ('student', 'teacher'))
    solved = {place_of(cell): cell_text(cell) for cell in teacher}
    before, number = '', 0
    for cell in [cell for cell in student if cell['cell_type'] == 'code']:
        place, text = place_of(cell), cell_text(cell)
        if place.endswith('solution'):
            missing, number = (before, solved[place], text), number + 1
        elif place.endswith('check1'):
            rest = [other for name, other in solved.items() if name.startswith(place[:-1])]
            assert needs_the_solution(*missing, '\n'.join(rest)), place
        before += f'{text}\n'
    assert number == len([place for place in solved if place.endswith('check1')]) > 0


def test_a_check_that_needs_no_solution_is_found():
    blank, top = f'def f():\n{textwrap.indent(CODE_STUB, "    ")}', CODE_STUB
    assert needs_the_solution('', 'x = 1', top, 'assert x == 1')
    assert needs_the_solution('', 'def f():\n    return 1', blank, 'assert f() == 1')
    assert not needs_the_solution('x = 1', 'x = 1', top, 'assert x == 1')   # an older x would be checked
    assert not needs_the_solution('', 'x = 1', top, 'assert 1 == 1')
    assert not needs_the_solution('for i, x in y:\n    pass', 'x = 1', top, 'assert x')


# ---- the versions --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('version', ('student', 'teacher'))
def test_versions_are_notebooks_with_nbgrader_s_metadata(version, versions):
    "The rules of its schema 3: unique ids, points where something is graded, graded text is a solution."
    import nbformat
    for page in PAGES:
        made = notebook(versions/version/page)
        nbformat.validate(made)
        marks = [cell.metadata.nbgrader for cell in made.cells if 'nbgrader' in cell.metadata]
        assert len({mark.grade_id for mark in marks}) == len(marks) > 0
        for mark in marks:
            assert {*mark} - {'points'} == {'schema_version', 'cell_type', 'grade_id', 'grade', 'solution', 'locked',
                                            'task'}
            assert mark.grade == ('points' in mark) and not (mark.locked and mark.solution)
            assert mark.cell_type == 'code' or mark.grade == mark.solution
            assert re.fullmatch(r'[a-zA-Z0-9_-]+', mark.grade_id)


def test_students_get_no_solution_and_no_note(versions):
    for page in PAGES:
        source, student = cells(NBS/page), cells(versions/'student'/page)
        text = '\n'.join(map(cell_text, student))
        assert not re.search(r'(BEGIN|END) SOLUTION|<!-- teacher|For teachers, |\*Answer\.\*', text)
        solutions = [cell_text(source[e.answer]) for e in find_exercises(source)]
        assert text.count(CODE_STUB.split('\n')[1]) == sum('BEGIN SOLUTION' in s for s in solutions)
        assert text.count(TEXT_STUB) == sum('BEGIN SOLUTION' not in s for s in solutions)


def test_teachers_get_solutions_notes_and_minutes(versions):
    for page in PAGES:
        source, teacher = cells(NBS/page), cells(versions/'teacher'/page)
        text = '\n'.join(map(cell_text, teacher))
        exercises = find_exercises(source)
        assert len(re.findall(r'For teachers, \d+ minutes: ', text)) == len(exercises)
        assert text.count('### BEGIN SOLUTION') == sum(e.kind != 'Think' for e in exercises)


@pytest.mark.slow
def test_nbgrader_makes_our_student_version_of_the_teacher_version(versions):
    "Where it is installed: its validator accepts the metadata, and its preprocessor removes the same."
    formats = pytest.importorskip('nbgrader.nbgraderformat')
    clear = pytest.importorskip('nbgrader.preprocessors').ClearSolutions()
    for page in PAGES:
        student, teacher = (notebook(versions/version/page) for version in ('student', 'teacher'))
        formats.MetadataValidator().validate_nb(teacher)
        released, _ = clear.preprocess(teacher, {})
        assert [cell.source for cell in released.cells] == [cell.source for cell in student.cells], page


# ---- in a kernel ---------------------------------------------------------------------------------------------------

def run_both(page, versions):
    "(student's checks that fail, all checks, teacher's cells of exercises that fail), in one kernel."
    from nbclient import NotebookClient
    student, teacher = (notebook(versions/version/page) for version in ('student', 'teacher'))
    for cell in student.cells:
        if cell.cell_type == 'code' and re.search(r'^#\| ?(slow|gpu|notest|eval: false)', cell.source, re.M):
            cell.source = ''
    student.cells += [cell for cell in teacher.cells if cell.cell_type == 'code' and place_of(cell)]
    count = len(teacher.cells)
    for i, cell in enumerate(student.cells):
        cell.id = f'cell{i}'
    folder = dict(metadata=dict(path=str((NBS/page).parent)))
    NotebookClient(student, timeout=600, allow_errors=True, resources=folder).execute()
    failed = {True: [], False: []}   # before and after the teacher's cells begin
    for i, cell in enumerate(student.cells):
        if any(output.output_type == 'error' for output in cell.get('outputs', [])):
            assert place_of(cell), f'outside of exercises: {cell.source}'
            failed[i < count].append(place_of(cell))
    checks = [place for cell in teacher.cells if 'check' in (place := place_of(cell))]
    return [place for place in failed[True] if 'check' in place], checks, failed[False]


@KERNEL
def test_checks_fail_with_blanks_and_pass_with_solutions(page, versions):
    failed, checks, teachers = run_both(page, versions)
    assert failed == checks != []
    assert teachers == []
    print(f'{page}: {len(failed)} of {len(checks)} checks fail without solutions, all pass with them')


# ---- how long it takes ---------------------------------------------------------------------------------------------

def test_the_course_takes_seven_hours_and_no_chapter_more_than_half_an_hour_to_read():
    assert sum(exact_minutes(NBS/page) for page in CHAPTERS) <= COURSE
    assert {page: counts(NBS/page).reading for page in CHAPTERS if counts(NBS/page).reading > LONGEST} == {}


def test_questions_are_answered_outside_of_sections_for_the_curious():
    for item in json.loads((ROOT/'tests'/'project'/'course_questions.json').read_text()):
        prose = '\n'.join(text for _, cell, text in parts(ROOT/item['chapter']) if cell is None).lower()
        assert [term for term in item['terms'] if term.lower() not in prose] == [], item['question']
