"""Language codes as the names of lm_eval's tasks have them."""

from megatron_moe_lpr.data.language_names import language_codes, named_script, with_usual_script

# Belebele's and Flores' code of each language that has a two-letter one (ISO 639-1 to ISO 639-3 and script).
_PAIRS = (
    "af:afr_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng az:azj_Latn bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt "
    "ca:cat_Latn cs:ces_Latn da:dan_Latn de:deu_Latn el:ell_Grek en:eng_Latn es:spa_Latn et:est_Latn eu:eus_Latn "
    "fa:pes_Arab fi:fin_Latn fr:fra_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr hi:hin_Deva hr:hrv_Latn ht:hat_Latn "
    "hu:hun_Latn hy:hye_Armn id:ind_Latn ig:ibo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan jv:jav_Latn ka:kat_Geor "
    "kk:kaz_Cyrl km:khm_Khmr kn:kan_Knda ko:kor_Hang ky:kir_Cyrl ln:lin_Latn lo:lao_Laoo lt:lit_Latn lv:lvs_Latn "
    "mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva ms:zsm_Latn mt:mlt_Latn my:mya_Mymr "
    "ne:npi_Deva nl:nld_Latn no:nob_Latn ny:nya_Latn or:ory_Orya pa:pan_Guru pl:pol_Latn ps:pbt_Arab pt:por_Latn "
    "ro:ron_Latn ru:rus_Cyrl rw:kin_Latn sd:snd_Arab si:sin_Sinh sk:slk_Latn sl:slv_Latn sn:sna_Latn so:som_Latn "
    "sq:als_Latn sr:srp_Cyrl st:sot_Latn su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu tg:tgk_Cyrl "
    "th:tha_Thai ti:tir_Ethi tl:tgl_Latn tr:tur_Latn uk:ukr_Cyrl ur:urd_Arab uz:uzn_Latn vi:vie_Latn wo:wol_Latn "
    "xh:xho_Latn yo:yor_Latn zh:zho_Hans zu:zul_Latn ff:fuv_Latn gl:glg_Latn gn:grn_Latn lg:lug_Latn om:gaz_Latn "
    "ss:ssw_Latn tn:tsn_Latn ts:tso_Latn"
)
CODES = dict(pair.split(":") for pair in _PAIRS.split())
TWO_LETTERS = {code[:3]: two for two, code in CODES.items()}

# INCLUDE's 44 languages, by its English names.
_INCLUDE = (
    "ar:arabic az:azerbaijani be:belarusian bg:bulgarian bn:bengali de:german el:greek es:spanish et:estonian "
    "eu:basque fa:persian fi:finnish fil:tagalog fr:french he:hebrew hi:hindi hr:croatian hu:hungarian hy:armenian "
    "id:indonesian it:italian ja:japanese ka:georgian kk:kazakh ko:korean lt:lithuanian mk:north_macedonian "
    "ml:malayalam ms:malay ne:nepali nl:dutch pl:polish pt:portuguese ru:russian sq:albanian sr:serbian ta:tamil "
    "te:telugu tl:tagalog tr:turkish uk:ukrainian ur:urdu uz:uzbek vi:vietnamese zh:chinese"
)
INCLUDE = dict(pair.split(":") for pair in _INCLUDE.split())


def two_letters(language: str) -> str:
    """Return `el` for `el`, `EL`, `el-GR`, `ell` and `ell_Grek`; unchanged: a language without a two-letter code."""
    short = language.lower().replace("-", "_").partition("_")[0]
    return short if short in CODES else TWO_LETTERS.get(short, language)


def flores_code(language: str) -> str:
    """Return `ell_Grek` for `el`, `zho_Hant` for `zh-Hant`, `ceb_Latn` for `ceb`; unchanged: a tag of no language."""
    code, script = CODES.get(two_letters(language)), named_script(language)
    if code is None:
        return with_usual_script(language)
    return f"{code[:3]}_{script}" if script else code


def include_name(language: str) -> list[str]:
    """Return the name of a language in INCLUDE, `greek` for `el`; nothing if INCLUDE does not have it."""
    return [INCLUDE[language]] if language in INCLUDE else []


def three_letters(language: str) -> list[str]:
    """Return the three-letter codes of a language, Flores' first: `lvs lav` for `lv`, `ell gre` for `el`."""
    codes = [flores_code(language).partition("_")[0], *language_codes(language)]
    return [code for code in dict.fromkeys(codes) if len(code) == 3]
