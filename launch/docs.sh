#!/usr/bin/env bash
# Builds the docs site into site/: runs both notebooks, then checks every link. Fails if a notebook
# raises an error or a link is broken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
install_into_venv '.[docs]'

pages=$(mktemp -d)
trap 'rm -rf "$pages"' EXIT
cp -r docs mkdocs.yml "$pages"
# The outputs of the notebooks are not in the repository, so the site shows those of today.
.venv/bin/jupyter nbconvert --to markdown --execute --output-dir="$pages/docs/notebooks" \
  docs/notebooks/*.ipynb
rm "$pages"/docs/notebooks/*.ipynb
# In the site, a notebook is a page.
sed --in-place 's/\.ipynb\([)#]\)/.md\1/g' "$pages"/docs/*.md "$pages"/docs/notebooks/*.md
(cd "$pages" && "$OLDPWD/.venv/bin/zensical" build --strict --clean)
rm -rf site
mv "$pages/site" site
echo 'built: open site/index.html'
