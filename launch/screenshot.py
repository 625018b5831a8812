"""Takes the picture of README, docs/page.png, from the model that the quickstart trained.

bash launch/quickstart.sh
.venv/bin/pip install -e '.[serve]' playwright    # and Chromium, e.g. apt-get install chromium
.venv/bin/python launch/screenshot.py
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from playwright.sync_api import sync_playwright

ROOT = pathlib.Path(__file__).parents[1]
START_SECONDS = 300  # The service compiles all its programs before it answers.
WIDTH, HEIGHT = 1120, 846


def wait_until_ready(address: str) -> None:
  """Waits until the service answers."""
  end = time.monotonic() + START_SECONDS
  while True:
    try:
      urllib.request.urlopen(f'{address}/health', timeout=5).close()
      return
    except (urllib.error.URLError, TimeoutError):
      if time.monotonic() > end:
        sys.exit(f'error: {address} does not answer after {START_SECONDS} seconds')
      time.sleep(1)


def take(address: str, user: str, picture: pathlib.Path) -> None:
  """Opens the page, chooses a user and stores what Chromium shows."""
  chromium = shutil.which('chromium') or shutil.which('google-chrome')
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
    page = browser.new_page(
      color_scheme='light', viewport={'width': WIDTH, 'height': HEIGHT}, reduced_motion='reduce'
    )
    page.goto(address)
    page.fill('#choose-user input', user)
    page.locator('#choose-user [role=option]').first.click()
    page.wait_for_selector('#found > li >> nth=9')
    page.wait_for_timeout(500)
    page.screenshot(path=picture)
    browser.close()


def main() -> None:
  """Exports the model, serves it, and takes the picture."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument('--workdir', default='runs/synthetic', help='folder of the trained run')
  parser.add_argument('--user', default='u0001', help='the user on the picture')
  parser.add_argument('--port', type=int, default=8123, help='a free port')
  parser.add_argument('--out', type=pathlib.Path, default=ROOT / 'docs' / 'page.png')
  flags = parser.parse_args()
  address = f'http://127.0.0.1:{flags.port}'
  with tempfile.TemporaryDirectory() as folder:
    program = [sys.executable, '-m', 'ur4rec_jax.export', f'--workdir={flags.workdir}', '--users']
    subprocess.run([*program, f'--out={folder}/model'], check=True)
    command = [sys.executable, '-m', 'ur4rec_jax.serve', f'--export={folder}/model']
    with subprocess.Popen([*command, f'--port={flags.port}']) as service:
      try:
        wait_until_ready(address)
        take(address, flags.user, flags.out)
      finally:
        service.terminate()
  print(json.dumps({'picture': str(flags.out), 'kB': flags.out.stat().st_size // 1000}))


if __name__ == '__main__':
  main()
