import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.page_images import MAX_IMAGES, PageImage, images_of_html, srcset_urls

PAGE = "https://example.org/dir/page.html"


def urls(html: str, page: str = PAGE) -> list[str]:
    return [image.url for image in images_of_html(html.encode(), page, "utf-8")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.jpg 1x, b.jpg 2x,c.jpg", ["a.jpg", "b.jpg", "c.jpg"]),
        ("a,b.jpg 100w,  c.jpg", ["a,b.jpg", "c.jpg"]),
        ("a.jpg, b.jpg,", ["a.jpg", "b.jpg"]),
        ("w_2,h_3/x.jpg 200w (a, b), y.jpg", ["w_2,h_3/x.jpg", "y.jpg"]),
        ("", []),
        (" , ,", []),
    ],
)
def test_srcset_urls__reads_candidates(text, expected):
    assert srcset_urls(text) == expected


@pytest.mark.parametrize("piece", ["a", ",", " ", "a ", "a (", "a(,", "a, ", "a \t("])
def test_srcset_urls__is_linear(piece):
    began = time.process_time()
    srcset_urls(piece * 300_000)
    assert time.process_time() - began < 5  # quadratic: minutes


@pytest.mark.parametrize(
    "tag",
    [
        '<img src="a.jpg">',
        "<IMG SRC=' a.jpg '>",
        '<img srcset="a.jpg 2x">',
        '<img data-src="a.jpg">',
        '<img data-lazy-src="a.jpg">',
        '<img data-original="a.jpg">',
        '<img data-srcset="a.jpg 640w">',
        '<img data-lazy-srcset="a.jpg 640w">',
        '<noscript><img src="a.jpg"></noscript>',
        '<picture><source srcset="a.jpg 1x"><img></picture>',
        '<img src="/dir/../dir/a.jpg#top">',
        '<img src="//example.org/dir/a.jpg">',
        '<img src="data:image/gif;base64,R0" data-src="a.jpg" data-lazy="true" data-url="{a.b}">',
    ],
)
def test_images_of_html__finds_every_kind_of_link(tag):
    (found,) = urls(tag)
    assert found.partition("#")[0] == "https://example.org/dir/a.jpg"


def test_images_of_html__resolves_against_base():
    html = '<base href="/other/"><base href="/second/"><img src=a.jpg><img src="../b.jpg">'
    assert urls(html) == ["https://example.org/other/a.jpg", "https://example.org/b.jpg"]
    assert urls('<base href="http://[bad"><img src=a.jpg>') == ["https://example.org/dir/a.jpg"]


def test_images_of_html__leaves_out_what_leads_to_no_image_on_the_web():
    html = (
        '<img src=""><img src="#x"><img src="javascript:x()"><img src="ftp://h/a.jpg"><img>'
        '<video><source src="a.mp4"></video><script><img src="in-script.jpg"></script>'
        '<!-- <img src="in-comment.jpg"> --><a href="a.jpg">a</a>'
    )
    assert urls(html) == []


def test_images_of_html__alt_and_repeats():
    html = '<img src=a.jpg><img src=a.jpg alt=" Say &quot;A&quot; ">'
    html += '<picture><source srcset="b.webp"><img src=c.jpg alt="C"></picture>'
    assert images_of_html(html.encode(), PAGE) == [
        PageImage("https://example.org/dir/a.jpg", 'Say "A"'),
        PageImage("https://example.org/dir/b.webp", "C"),
        PageImage("https://example.org/dir/c.jpg", "C"),
    ]


def test_images_of_html__encodings():
    html = "<meta charset=windows-1251><img src=a.jpg alt='привет'>".encode("cp1251")
    assert images_of_html(html, PAGE)[0].alt == "привет"
    plain = "<img src=a.jpg alt='привет'>".encode("cp1251")
    assert images_of_html(plain, PAGE, "windows-1251")[0].alt == "привет"
    assert images_of_html(plain, PAGE, "no-such-encoding")[0].url.endswith("/a.jpg")


def test_images_of_html__is_bounded():
    html = "".join(f"<img src={i}.jpg>" for i in range(3000))
    assert len(urls(html)) == MAX_IMAGES
    assert urls(f"<img src={'a' * 9000}>") == []
    assert len(images_of_html(b"<img src=a alt='" + b"x" * 9000 + b"'>", PAGE)[0].alt) == 2048


PIECES = st.sampled_from(
    [
        *("<img ", "src=", "srcset='", 'data-src="', "<base href=", "<picture><source ", "alt="),
        *(">", "'", '"', "</noscript>", "<noscript>", "http://[", "//", "\\", "%", "\x00", "é"),
        *("<!--", "<svg>", "<template>", "&#xD800;", "&#0;", "1x, ", "(", "a.jpg", "\n"),
    ]
)


@given(st.lists(PIECES | st.text(max_size=5), max_size=40), st.sampled_from([PAGE, "", "http://["]))
@settings(max_examples=300, deadline=None)
def test_images_of_html__of_nonsense_gives_urls_that_files_can_hold(pieces, page):
    for image in images_of_html("".join(pieces).encode("utf-8", "surrogatepass"), page):
        assert image.url.lower().startswith(("http://", "https://"))
        (image.url + (image.alt or "")).encode()


@given(st.binary(max_size=300), st.text(max_size=10))
@settings(max_examples=200, deadline=None)
def test_images_of_html__of_noise_raises_nothing(page, encoding):
    images_of_html(page, PAGE, encoding)
