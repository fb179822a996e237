"""report.html: its contents and, if selenium and Chromium are installed, how it works in a browser."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, call
from PIL import Image

import evaluate
from kit.draw import LARGE, Entry, heat_and_line, photograph, picture, save_views, views_of, write_page
from kit.files import OwnFiles
from kit.real_defects import read_corrections
from kit.verdict import Thresholds, decide
from methods import load


def data_of(page) -> dict:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_no_file_name_becomes_a_part_of_the_page(tmp_path):
    names = ["</script><b>x", "\udcff.png", "ein Bild.png"]
    entries = [Entry(name, "good", False, 0.25, tmp_path / name) for name in names]
    write_page(OwnFiles(tmp_path, "judged"), "<i>", {"a<": "b"}, 0.5, entries)
    assert "<b>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    found = data_of(tmp_path / "report.html")
    assert [image[0] for image in found["images"]] == ["</script><b>x", "\ufffd.png", "ein Bild.png"]
    assert found["title"] == "<i>" and found["facts"] == [["a<", "b"]] and found["threshold"] == 0.5


def test_views_show_where_it_is(tmp_path):
    """A wide image that is larger than the page's pictures, with a defect in its lower right."""
    anomaly_map = np.zeros((500, 1500), np.float32)
    anomaly_map[400:450, 1200:1300] = 3
    verdict = decide(2.0, anomaly_map, Thresholds(1.0, 1.0, 9, 0.2))
    mask = np.zeros((64, 64), bool)
    mask[51:57, 51:55] = True
    photo = photograph(Image.new("RGB", (1500, 500), "#808080"), LARGE)
    own = OwnFiles(tmp_path, "judged")
    save_views(own, "a/b.png", views_of(photo, verdict, verdict_limits(), mask))
    views = {view: Image.open(tmp_path / picture("a/b.png", view)) for view in ("outline", "photo", "heat", "mask")}
    assert {view.size for view in views.values()} == {(900, 300)}
    assert Image.open(tmp_path / picture("a/b.png", "thumb")).size == (192, 64)
    red = np.asarray(views["outline"]).astype(int)[..., 0] - np.asarray(views["outline"])[..., 1] > 60
    rows, columns = np.nonzero(red)
    assert 235 <= rows.min() <= rows.max() <= 275 and 715 <= columns.min() <= columns.max() <= 785
    assert np.asarray(views["heat"].convert("L"))[255, 750] > 200 > np.asarray(views["heat"].convert("L"))[20, 20]
    assert np.asarray(views["mask"].convert("L"))[253, 745] > 200
    limits = verdict_limits()
    save_views(own, "a/b.png", views_of(Image.new("RGB", (50, 50)), decide(0.5, anomaly_map, limits), limits))
    assert not any((tmp_path / picture("a/b.png", view)).exists() for view in ("outline", "mask"))


def test_a_small_region_has_an_outline_in_a_smaller_picture():
    for place in (700, 701, 702, 703):
        anomaly_map = np.zeros((1000, 1000), np.float32)
        anomaly_map[place, place] = 3
        _, line = heat_and_line(decide(2.0, anomaly_map, verdict_limits()), (225, 225))
        assert line.any()


def verdict_limits() -> Thresholds:
    return Thresholds(1.0, 1.0, 9, 0.2)


def test_pages_of_test_images_and_of_new_ones(measured_run, category, tmp_path):
    run = measured_run
    found = data_of(run / "report.html")
    metrics = json.loads((run / "metrics.json").read_text())
    assert (
        found["threshold"] == metrics["threshold"] and len(found["images"]) == sum(SMALL.values()) - SMALL["train/good"]
    )
    flagged = [image[3] > found["threshold"] for image in found["images"] if image[2]]
    assert np.mean(flagged) == metrics["recall"]
    for _, _, anomalous, score, key, views, _, _ in found["images"]:
        assert ("outline" in views) == (score > found["threshold"]) and ("mask" in views) == anomalous
        assert all((run / "report_files" / f"{key}.{view}.jpg").exists() for view in (*views, "thumb"))
    call(evaluate.main, run, "--images", category / "test", "--out", tmp_path / "out")
    new = data_of(tmp_path / "out" / "report.html")
    assert {image[1] for image in new["images"]} == {"good", "crack", "chip", "stain"}
    assert all(image[2] is None for image in new["images"])
    assert all(category / "test" / image[0] == Path(image[6]) and not image[7] for image in new["images"])


def test_the_page_knows_the_images_that_were_trained_on(run, category, tmp_path):
    mine = Path(load(run / "model.pt").settings.data)
    (tmp_path / "link").symlink_to(mine / "train")
    call(evaluate.main, run, "--images", tmp_path / "link", "--out", tmp_path / "out")
    found = data_of(tmp_path / "out" / "report.html")["images"]
    assert len(found) == 24 and all(trained and Path(path).is_file() for *_, path, trained in found)


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium here")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{argument}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


def test_slider_order_filter_and_viewer(measured_run, browser):
    images = data_of(measured_run / "report.html")["images"]
    browser.get((measured_run / "report.html").as_uri())

    def element(selector):
        return browser.find_element("css selector", selector)

    def captions() -> list[str]:
        return [card.text for card in browser.find_elements("css selector", "figure figcaption")]

    def choose(selector, value):
        browser.execute_script(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change'));", selector, value)  # fmt: skip

    assert len(captions()) == len(images)
    choose("#threshold", 100)
    assert "recall 0.0 %" in element("#numbers").text and "false alarms 0.0 %" in element("#numbers").text
    choose("#verdict", "missed")
    assert len(captions()) == sum(image[2] for image in images)
    choose("#verdict", "all")
    choose("#threshold", -100)
    assert "recall 100.0 %" in element("#numbers").text and "false alarms 100.0 %" in element("#numbers").text
    element("#reset").click()
    choose("#kind", "chip")
    assert len(captions()) == 4 and all("chip/" in text for text in captions())
    choose("#kind", "all")
    choose("#order", "highest score first")
    ranked = sorted(images, key=lambda image: -image[3])
    assert [text.splitlines()[1] for text in captions()] == [image[0] for image in ranked]
    element("figure").click()
    assert ranked[0][0] in element("#caption").text
    first = element("#large").get_attribute("src")
    assert first.endswith(f"{ranked[0][4]}.{ranked[0][5][0]}.jpg")
    element("#stage").click()
    assert element("#large").get_attribute("src") != first
    element("body").send_keys("\ue014")  # arrow to the right
    assert ranked[1][0] in element("#caption").text
    assert element("#large").get_property("naturalWidth") > 0
    for width in (1280, 390):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_ticks_become_corrections(run, category, tmp_path, browser):
    """A flagged and a normal image of a folder of new images are ticked, one of them in the viewer; a third is ticked
    by mistake."""
    call(evaluate.main, run, "--images", category / "test", "--out", tmp_path / "out")
    found = data_of(tmp_path / "out" / "report.html")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    screen = {"height": 900, "deviceScaleFactor": 1, "mobile": False}  # a window cannot be narrower than its minimum
    for width in (1280, 390):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen | {"width": width})
        browser.get((tmp_path / "out" / "report.html").as_uri())
        cards = browser.find_elements("css selector", "figure")  # highest score first
        save = browser.find_element("css selector", "#save")
        assert not save.is_enabled()
        boxes = [card.find_element("css selector", ".tick input") for card in cards]
        assert all(min(box.size.values()) >= 18 for box in boxes[:2])  # boxes further down are not laid out yet
        boxes[0].click()
        boxes[1].click()
        assert not browser.find_element("css selector", "#viewer").is_displayed()
        boxes[1].click()
        cards[-1].find_element("css selector", "img").click()
        browser.find_element("css selector", "#correction input").click()
        browser.find_element("css selector", "#close").click()
        told = [card.get_attribute("textContent") for card in cards]
        assert "saved as: missed defect" in told[-1] and "saved as: false alarm" in told[0]
        assert "this is wrong" in told[1]
        # A ticked image keeps its list when the threshold moves.
        browser.execute_script("moveTo(100)")
        assert save.text == "Save corrections.json: 1 missed defect, 1 false alarm"
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        save.click()
        file = tmp_path / "corrections.json"
        for _ in range(100):
            if file.exists():
                break
            time.sleep(0.1)
        ranked = sorted(found["images"], key=lambda image: -image[3])
        assert ranked[-1][3] <= found["threshold"] < ranked[0][3]
        expected = {"missed": [ranked[-1][6]], "false_alarms": [ranked[0][6]], "not_good": []}
        assert json.loads(file.read_text()) == expected
        assert read_corrections(file).missed == [Path(ranked[-1][6])]
        file.unlink()
