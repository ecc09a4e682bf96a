def test_a(server, open_page):
    page = open_page(server.url)
    page.wait_for_selector("#generate")
    assert page.title() == "codmd-serve"
