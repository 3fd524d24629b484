"""The playground in a real browser, against a real server. Without Chromium or the built page these tests skip."""
