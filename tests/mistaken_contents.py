"""What stands in place of a file after a clone without Git LFS or a failed download, and what must be said of it."""

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)

MISTAKEN = {
    "a Git LFS pointer": (POINTER, ("Git LFS pointer", "git lfs pull")),
    "a web page": (b"<!doctype html><html>Sign in</html>" * 30, ("HTML page", "download it again")),
    "a page with a mark": (b"\xef\xbb\xbf\r\n<HTML><body>404</body></HTML>", ("HTML page", "download it again")),
    "a page in XML": (b'<?xml version="1.0"?>\n<html xmlns="h"><body/></html>', ("HTML page", "download it again")),
}
"""Content, and the words, by what it is."""
