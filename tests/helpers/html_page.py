"""Pages as tests read them."""

from html.parser import HTMLParser

VOID = {'meta', 'img'}


class Page(HTMLParser):
  """Elements and texts of a page; fails where tags are not balanced or something is fetched."""

  def __init__(self, html: str):
    super().__init__()
    self.open, self.elements, self.texts = [], [], []
    self.feed(html)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.elements.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)
    assert tag not in {'script', 'link', 'iframe', 'object', 'embed', 'base', 'a'}
    for name, value in attributes:
      assert not name.startswith('on')
      assert name not in {'href', 'srcset', 'poster', 'action', 'xlink:href'}
      assert name != 'src' or value.startswith('data:image/jpeg;base64,')

  def handle_startendtag(self, tag, attributes):
    self.handle_starttag(tag, attributes)
    self.handle_endtag(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == 'style':
      assert 'url(' not in data
      assert '@import' not in data
    elif data.strip():
      self.texts.append(data.strip())

  def all(self, tag: str) -> list[dict]:
    return [attributes for name, attributes in self.elements if name == tag]
