"""Words are cut as a reader of the language would cut them."""

from notellm2_ray.core.schema import Note
from notellm2_ray.core.words import note_text, tokenize


def test_english_is_stemmed_and_chinese_is_cut_into_words():
    assert tokenize("Baking THREE cakes, don't!") == ["bake", "three", "cake", "don't"]
    assert tokenize("巧克力蛋糕") == ["巧克力", "蛋糕"]
    assert tokenize("用iPhone拍摄北京夜景 #旅行_攻略") == ["用", "iphon", "拍摄", "北京", "夜景", "旅行", "攻略"]
    assert tokenize(" ,。!？ ") == []


def test_scripts_of_southeast_asia_are_cut_into_pairs_of_letters_with_their_marks():
    assert tokenize("แมวสีแดง 3 ตัว") == ["แม", "มว", "วสี", "สีแ", "แด", "ดง", "3", "ตัว"]
    assert tokenize("ก") == ["ก"]
    shared = set(tokenize("นอนกับแมวสีแดง")) & set(tokenize("แมวสีแดงนอน"))
    assert {"แม", "มว", "แด", "ดง"} <= shared


def test_all_parts_of_a_note_are_read():
    note = Note("n", "title words", ("topic one", "话题"), "content words", None)
    assert set(tokenize(note_text(note))) >= {"titl", "topic", "one", "话题", "content"}
