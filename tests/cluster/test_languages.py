"""Languages: a wish is found or refused with suggestions, an instruction is read back, detection names every one."""

from __future__ import annotations

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.languages import (
    CATALOGUE,
    MEASURED,
    UNDETERMINED,
    InstructionForm,
    declared_language,
    detect_language,
    detection_candidates,
    find_language,
    reasoning_instruction,
)

FORMS: tuple[InstructionForm, ...] = ("english", "japanese")

SENTENCES = [
    ("en", "First I add the two numbers, then I check the result once more."),
    ("en", "There are three apples left, so the answer is three."),
    ("ja", "まず二つの数を足して、それから結果を確かめます。"),
    ("ja", "りんごが三個残っているので、答えは三です。"),
    ("ja", "東京都知事選挙投票日変更は未定"),
    ("ja", "コンピューターは計算が速い"),
    ("fr", "D'abord j'additionne les deux nombres, puis je vérifie le résultat."),
    ("fr", "Il reste trois pommes, donc la réponse est trois."),
    ("de", "Zuerst addiere ich die beiden Zahlen, dann prüfe ich das Ergebnis."),
    ("de", "Es bleiben drei Äpfel übrig, also ist die Antwort drei."),
    ("es", "Primero sumo los dos números y luego compruebo el resultado."),
    ("es", "Quedan tres manzanas, así que la respuesta es tres."),
    ("zh", "首先把两个数字相加,然后再检查一遍结果。"),
    ("zh", "還剩三個蘋果,所以答案是三。"),
    ("ko", "먼저 두 수를 더한 다음 결과를 다시 확인합니다."),
    ("ko", "사과가 세 개 남았으므로 답은 셋입니다."),
    ("ar", "أولا أجمع العددين ثم أتحقق من النتيجة مرة أخرى."),
    ("ar", "بقيت ثلاث تفاحات، إذن الجواب هو ثلاثة."),
    ("hi", "पहले मैं दोनों संख्याओं को जोड़ता हूँ, फिर परिणाम की जाँच करता हूँ।"),
    ("hi", "तीन सेब बचे हैं, इसलिए उत्तर तीन है।"),
]
"""of the measured languages, told apart by default"""

CATALOGUE_SENTENCES = {
    "en": "The train leaves at half past seven, so we should meet at the station a little earlier.",
    "ja": "電車は七時半に出るので、その少し前に駅で待ち合わせたほうがよいと思います。",
    "fr": "Le train part à sept heures et demie, nous devrions donc nous retrouver un peu plus tôt à la gare.",
    "de": "Der Zug fährt um halb acht ab, deshalb sollten wir uns etwas früher am Bahnhof treffen.",
    "es": "El tren sale a las siete y media, así que deberíamos encontrarnos un poco antes en la estación.",
    "zh": "火车七点半出发,所以我们应该早一点在车站见面,这样就不会迟到。",
    "ko": "기차가 일곱 시 반에 출발하니까 조금 더 일찍 역에서 만나는 것이 좋겠습니다.",
    "ar": "ينطلق القطار في السابعة والنصف، لذلك ينبغي أن نلتقي في المحطة قبل ذلك بقليل.",
    "hi": "रेलगाड़ी साढ़े सात बजे चलती है, इसलिए हमें स्टेशन पर थोड़ा पहले मिलना चाहिए।",
    "pt": "O comboio parte às sete e meia, por isso devíamos encontrar-nos um pouco mais cedo na estação.",
    "it": "Il treno parte alle sette e mezza, quindi dovremmo incontrarci alla stazione un po' prima.",
    "nl": "De trein vertrekt om half acht, dus we moeten elkaar iets eerder op het station ontmoeten.",
    "pl": "Pociąg odjeżdża o wpół do ósmej, więc powinniśmy spotkać się na dworcu trochę wcześniej.",
    "ru": "Поезд отправляется в половине восьмого, поэтому нам лучше встретиться на вокзале немного раньше.",
    "uk": "Потяг вирушає о пів на восьму, тому нам краще зустрітися на вокзалі трохи раніше.",
    "tr": "Tren yedi buçukta kalkıyor, bu yüzden istasyonda biraz daha erken buluşmamız gerekiyor.",
    "vi": "Tàu khởi hành lúc bảy giờ rưỡi, vì vậy chúng ta nên gặp nhau ở nhà ga sớm hơn một chút.",
    "th": "รถไฟออกเวลาเจ็ดโมงครึ่ง ดังนั้นเราควรนัดเจอกันที่สถานีก่อนเวลาสักเล็กน้อย",
    "id": "Kereta berangkat pukul setengah delapan, jadi sebaiknya kita bertemu di stasiun sedikit lebih awal.",
    "ms": "Kereta api bertolak pada pukul tujuh setengah, jadi kita perlu berjumpa di stesen lebih awal sedikit.",
    "fa": "قطار ساعت هفت و نیم حرکت می‌کند، پس بهتر است کمی زودتر در ایستگاه همدیگر را ببینیم.",
    "he": "הרכבת יוצאת בשבע וחצי, ולכן כדאי שניפגש בתחנה קצת יותר מוקדם.",
    "sv": "Tåget går klockan halv åtta, så vi borde träffas på stationen lite tidigare än så.",
    "da": "Toget kører klokken halv otte, så vi bør hellere mødes lidt tidligere på banegården.",
    "nb": "Toget går klokka halv åtte, så vi burde møtes på stasjonen litt tidligere enn det.",
    "fi": "Juna lähtee puoli kahdeksalta, joten meidän pitäisi tavata asemalla hieman aikaisemmin.",
    "cs": "Vlak odjíždí v půl osmé, takže bychom se měli sejít na nádraží o něco dříve.",
    "sk": "Vlak odchádza o pol ôsmej, takže by sme sa mali stretnúť na stanici o niečo skôr.",
    "hu": "A vonat fél nyolckor indul, ezért kicsit korábban kellene találkoznunk az állomáson.",
    "ro": "Trenul pleacă la șapte și jumătate, așa că ar trebui să ne întâlnim la gară puțin mai devreme.",
    "bg": "Влакът тръгва в седем и половина, затова трябва да се срещнем на гарата малко по-рано.",
    "el": "Το τρένο φεύγει στις επτάμισι, οπότε θα έπρεπε να συναντηθούμε στον σταθμό λίγο νωρίτερα.",
    "hr": "Vlak polazi u pola osam, pa bismo se trebali naći na kolodvoru nešto ranije.",
    "sr": "Воз полази у пола осам, па би требало да се нађемо на станици нешто раније.",
    "sl": "Vlak odpelje ob pol osmih, zato bi se morali na postaji dobiti malo prej.",
    "lt": "Traukinys išvyksta pusę aštuonių, todėl turėtume susitikti stotyje šiek tiek anksčiau.",
    "lv": "Vilciens atiet pusastoņos, tāpēc mums vajadzētu satikties stacijā nedaudz agrāk.",
    "et": "Rong väljub kell pool kaheksa, seega peaksime jaamas natuke varem kohtuma.",
    "ca": "El tren surt a dos quarts de vuit, així que ens hauríem de trobar a l'estació una mica abans.",
    "bn": "ট্রেনটি সাড়ে সাতটায় ছাড়ে, তাই আমাদের একটু আগেই স্টেশনে দেখা করা উচিত।",
    "ta": "ரயில் ஏழரை மணிக்குப் புறப்படுகிறது, எனவே நாம் சற்று முன்னதாகவே நிலையத்தில் சந்திக்க வேண்டும்.",
    "te": "రైలు ఏడున్నరకు బయలుదేరుతుంది, కాబట్టి మనం కొంచెం ముందుగానే స్టేషన్‌లో కలుసుకోవాలి.",
    "mr": "रेल्वे साडेसात वाजता सुटते, म्हणून आपण थोडे आधी स्थानकावर भेटायला हवे.",
    "ur": "ریل گاڑی ساڑھے سات بجے روانہ ہوتی ہے، اس لیے ہمیں سٹیشن پر کچھ پہلے ملنا چاہیے۔",
    "gu": "ટ્રેન સાડા સાત વાગ્યે ઊપડે છે, તેથી આપણે થોડા વહેલા સ્ટેશન પર મળવું જોઈએ.",
    "pa": "ਰੇਲਗੱਡੀ ਸਾਢੇ ਸੱਤ ਵਜੇ ਚੱਲਦੀ ਹੈ, ਇਸ ਲਈ ਸਾਨੂੰ ਸਟੇਸ਼ਨ 'ਤੇ ਥੋੜ੍ਹਾ ਪਹਿਲਾਂ ਮਿਲਣਾ ਚਾਹੀਦਾ ਹੈ।",
    "ml": "ട്രെയിൻ ഏഴരയ്ക്ക് പുറപ്പെടും, അതുകൊണ്ട് നമ്മൾ കുറച്ചു നേരത്തെ സ്റ്റേഷനിൽ കണ്ടുമുട്ടണം.",
    "kn": "ರೈಲು ಏಳೂವರೆಗೆ ಹೊರಡುತ್ತದೆ, ಆದ್ದರಿಂದ ನಾವು ಸ್ವಲ್ಪ ಮುಂಚೆಯೇ ನಿಲ್ದಾಣದಲ್ಲಿ ಭೇಟಿಯಾಗಬೇಕು.",
    "sw": "Treni inaondoka saa moja na nusu, kwa hiyo tunapaswa kukutana kituoni mapema kidogo.",
    "fil": "Aalis ang tren nang alas siyete y medya, kaya dapat tayong magkita sa istasyon nang mas maaga.",
    "zh-Hant": "火車七點半出發,所以我們應該早一點在車站見面,這樣就不會遲到。",
    "pt-BR": "O trem sai às sete e meia, então a gente devia se encontrar um pouco mais cedo na estação.",
}


@pytest.mark.parametrize("tag", CATALOGUE)
def test_found_by_every_name(tag: str) -> None:
    language = CATALOGUE[tag]
    names = (tag, language.name, language.autonym, language.japanese_name, *language.aliases)
    for name in names:
        decomposed = unicodedata.normalize("NFD", name)
        for wish in (name, name.upper(), name.lower(), f"  {name} ", decomposed, name.replace(" ", "  ")):
            assert find_language(wish) == language, wish
    assert find_language(tag.replace("-", "_")) == language


@pytest.mark.parametrize(
    ("wish", "tag"),
    [
        ("fr-CA", "fr"),
        ("en_US", "en"),
        ("ES-mx", "es"),
        ("zh-CN", "zh"),
        ("zh-Hans-HK", "zh"),
        ("zh-TW", "zh-Hant"),
        ("zh_hk", "zh-Hant"),
        ("zh-Hant-TW", "zh-Hant"),
        ("pt-PT", "pt"),
        ("pt_br", "pt-BR"),
        ("sr-Latn-RS", "sr"),
        ("iw-IL", "he"),
        ("no", "nb"),
        ("tl-PH", "fil"),
    ],
)
def test_found_by_region(wish: str, tag: str) -> None:
    assert find_language(wish).tag == tag


@pytest.mark.parametrize(
    ("wish", "tag"),
    [
        ("Français", "fr"),
        ("FRANCAIS", "fr"),
        ("Tieng Viet", "vi"),
        ("mandarin", "zh"),
        ("Farsi", "fa"),
        ("Castilian", "es"),
        ("Brazilian Portuguese", "pt-BR"),
        ("Bengali", "bn"),
        ("tagalog", "fil"),
        ("Norwegian", "nb"),
        ("ノルウェー語（ブークモール）", "nb"),
        ("ﾌﾗﾝｽ語", "fr"),
    ],
)
def test_found_by_alias(wish: str, tag: str) -> None:
    assert find_language(wish).tag == tag


@pytest.mark.parametrize("wish", ["", "tlh", "Klingon", "french fries", "fra", "-fr", "fr-", "fr--CA", "x-fr"])
def test_unknown_wish_names_some_that_are_known(wish: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        find_language(wish)
    message = str(caught.value)
    assert repr(wish) in message
    assert all(f"{tag} ({CATALOGUE[tag].name})" in message for tag in MEASURED)
    assert "Estonian" not in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("wish", "suggestion"),
    [
        ("Frensh", "fr (French)"),
        ("portugese", "pt (Portuguese)"),
        ("Ukranian", "uk (Ukrainian)"),
        ("Bahasa Indonesa", "id (Indonesian)"),
        ("ヒンデー語", "hi (Hindi)"),
    ],
)
def test_misspelt_wish_gets_a_suggestion(wish: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match="did you mean") as caught:
        find_language(wish)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize("wish", ["fr-" * 300_000, "French " * 100_000, "x" * 1_000_000])
def test_very_long_wish_is_refused_in_a_short_message(wish: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        find_language(wish)
    assert len(str(caught.value)) < 400


def test_catalogue() -> None:
    assert 45 <= len(CATALOGUE) <= 60
    assert all(language.tag == tag for tag, language in CATALOGUE.items())
    assert MEASURED == ("en", "ja", "fr", "de", "es", "zh", "ko", "ar", "hi")
    for names in ("name", "autonym", "japanese_name"):
        assert len({getattr(language, names) for language in CATALOGUE.values()}) == len(CATALOGUE)


def test_direction() -> None:
    assert {tag for tag, language in CATALOGUE.items() if language.direction == "rtl"} == {"ar", "fa", "he", "ur"}
    assert CATALOGUE["ja"].direction == "ltr"


@pytest.mark.parametrize(
    ("tag", "form", "instruction"),
    [
        ("fr", "english", "reasoning language: French"),
        ("ja", "english", "reasoning language: Japanese"),
        ("fr", "japanese", "推論言語: フランス語"),
        ("zh-Hant", "japanese", "推論言語: 繁体中国語"),
    ],
)
def test_instruction(tag: str, form: InstructionForm, instruction: str) -> None:
    assert reasoning_instruction(tag, form) == instruction


def test_instruction_is_english_by_default() -> None:
    assert reasoning_instruction("de") == reasoning_instruction("de", "english") == "reasoning language: German"


@given(
    st.sampled_from(sorted(CATALOGUE)),
    st.sampled_from(FORMS),
    st.sampled_from(["", "Be brief.\n", "あなたは親切です。\n\n", "one\r\n"]),
    st.sampled_from(["", "\n\nBe brief.", "\r\nBe brief.", "  ", "\n推論言語: ドイツ語"]),
)
def test_declared_language_is_the_inverse(tag: str, form: InstructionForm, before: str, after: str) -> None:
    instruction = reasoning_instruction(tag, form)
    assert declared_language(before + instruction + after) == tag
    assert declared_language((before + instruction + after).upper()) == tag
    assert declared_language(before + instruction.replace(": ", "：") + after) == tag


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("  Reasoning Language : fr-CA", "fr"),
        ("推論言語：日本語。", "ja"),
        ("reasoning language: Deutsch.\nreasoning language: French", "de"),
        ("", None),
        ("Be brief.", None),
        ("reasoning language:", None),
        ("reasoning language:\nFrench", None),
        ("reasoning language: Klingon", None),
        ("Set the reasoning language: French", None),
        ("reasoning language French", None),
        ("answer language: French", None),
        ("reasoning language: " + " " * 200_000 + "x", None),
    ],
)
def test_declared_language(text: str, tag: str | None) -> None:
    assert declared_language(text) == tag


@pytest.mark.parametrize(("tag", "text"), SENTENCES)
def test_detected(tag: str, text: str) -> None:
    assert detect_language(text) == tag


@pytest.mark.parametrize(("tag", "text"), SENTENCES)
def test_detected_beside_numbers_and_a_foreign_word(tag: str, text: str) -> None:
    assert detect_language(f"12 × (3 + 4) = 84. {text} OK? 84!\n") == tag


@pytest.mark.parametrize("tag", CATALOGUE)
def test_detected_among_the_whole_catalogue(tag: str) -> None:
    text = CATALOGUE_SENTENCES[tag]
    assert detect_language(text, CATALOGUE) == ("pt" if tag == "pt-BR" else tag)
    assert detect_language(text, detection_candidates(tag)) == tag
    assert detect_language(text, [tag]) == tag


@pytest.mark.parametrize("text", ["", "  \n", "42", "3 × 4 = 12", "!?…", "x = y", "Привет, как твои дела сегодня?"])
def test_too_little_or_none_of_ours_is_undetermined(text: str) -> None:
    assert detect_language(text) == UNDETERMINED == "und"


@pytest.mark.parametrize(
    ("among", "text"),
    [
        (["ja"], "There are three apples left, so the answer is three."),
        (["en", "ru"], "사과가 세 개 남았으므로 답은 셋입니다."),
        ([], "There are three apples left, so the answer is three."),
        (CATALOGUE, "Привет!"),
    ],
)
def test_no_candidate_is_undetermined(among: list[str], text: str) -> None:
    assert detect_language(text, among) == UNDETERMINED


@pytest.mark.parametrize(
    ("among", "text", "tag"),
    [
        (["ja", "zh-Hant"], "還剩三個蘋果,所以答案是三。", "zh-Hant"),
        (["zh", "zh-Hant"], "還剩三個蘋果,所以答案是三。", "zh-Hant"),
        (["zh", "zh-Hant"], "还剩三个苹果,所以答案是三。", "zh"),
        (["ja", "en"], "首先把两个数字相加", "ja"),
        (["pt", "pt-BR"], CATALOGUE_SENTENCES["pt-BR"], "pt"),
        (["hr", "sr"], CATALOGUE_SENTENCES["hr"], "hr"),
        (["sl", "sr"], "Voz polazi u pola osam, pa bi trebalo da se nađemo na stanici nešto ranije.", "sr"),
    ],
)
def test_detected_among_neighbours(among: list[str], text: str, tag: str) -> None:
    assert detect_language(text, among) == tag
    assert detect_language(text, iter(among)) == tag


def test_unknown_candidate_is_refused() -> None:
    with pytest.raises(ValueError, match="'tlh'"):
        detect_language("There are three apples left.", ["en", "tlh"])


def test_the_script_with_most_letters_decides() -> None:
    assert detect_language("The Japanese word for apple is りんご, and it is a common word there.") == "en"
    assert detect_language("「apple」という英語の単語は、日本語ではりんごと言います。") == "ja"


def test_the_identifier_is_loaded_on_first_use() -> None:
    code = "import sys, cluster.languages\nsys.exit('py3langid' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
