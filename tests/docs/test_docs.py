"""The links of README and docs lead somewhere, and the site shows every page."""

import json
import re

import pytest
import yaml

from tests.helpers.runs import ROOT
from ur4rec_jax.errors import exit_code_table

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
NOTEBOOKS = sorted((ROOT / 'docs' / 'notebooks').glob('*.ipynb'))


def anchors(page) -> set[str]:
  """The anchors of a page's headings, as GitHub and the site make them."""
  text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)
  titles = re.findall(r'^#+ (.+)$', text, flags=re.M)
  return {re.sub(r'[^\w\- ]', '', title.lower()).strip().replace(' ', '-') for title in titles}


def text_of(page) -> str:
  """A page without its blocks of code, or the Markdown of a notebook."""
  if page.suffix == '.ipynb':
    cells = json.loads(page.read_text())['cells']
    return '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
  return re.sub(r'^```.*?^```', '', page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize('page', [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)\s]+)\)', text_of(page)):
    if link.startswith('http'):
      continue
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.is_file(), f'{page.name}: {link}'
    # The site holds only docs/, so its pages must not link to other folders.
    assert page == ROOT / 'README.md' or target.is_relative_to(ROOT / 'docs'), link
    assert not anchor or anchor in anchors(target), f'{page.name}: {link}'


def test_what_the_comparison_says_of_this_project_is_shown():
  table = [x for x in (ROOT / 'docs' / 'comparison.md').read_text().splitlines() if x[:2] == '| ']
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table[2:]]
  assert len(cells) > 15
  assert all(len(row) == len(table[0].strip('|').split('|')) for row in cells)
  assert [row[0] for row in cells if '](' not in row[1]] == []


def test_the_site_shows_every_page():
  shown = str(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])
  pages = [path.relative_to(ROOT / 'docs').with_suffix('.md') for path in (*PAGES[1:], *NOTEBOOKS)]
  assert sorted(re.findall(r"'([\w/]+\.md)'", shown)) == sorted(map(str, pages))


def test_the_table_of_exit_codes_is_that_of_the_program():
  assert exit_code_table() in (ROOT / 'docs' / 'training.md').read_text()


def test_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 200


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda page: page.name)
def test_notebooks_are_stored_without_outputs(notebook):
  cells = json.loads(notebook.read_text())['cells']
  assert not any(cell.get('outputs') or cell.get('execution_count') for cell in cells)


def test_the_tree_of_the_architecture_page_is_complete():
  tree = (ROOT / 'docs' / 'architecture.md').read_text().split('```')[1]
  modules = [p for p in (ROOT / 'ur4rec_jax').rglob('*.py') if p.name != '__init__.py']
  modules = [p for p in modules if 'configs' not in p.parts[-2:]]
  missing = [str(p.relative_to(ROOT)) for p in modules if p.name not in tree]
  assert not missing
  folders = [p for p in (ROOT / 'ur4rec_jax').iterdir() if (p / '__init__.py').exists()]
  assert not [p.name for p in folders if f'  {p.name}/' not in tree]
