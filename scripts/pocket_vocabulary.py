"""Words of the pocket world: every label a synthetic screen can show, with its Chinese name.

In: nothing. Out: tables of labels, one entry per thing that can be drawn or asked for.
Labels are unique over all tables, so a label names one class. Screens show the English label only (the font
embedded in Pillow has no Chinese glyphs); instructions use either language. This module knows nothing of
pixels, layouts or answers.
"""

from __future__ import annotations

from typing import NamedTuple

Color = tuple[int, int, int]


class App(NamedTuple):
    """A home screen application: its Chinese name, tile colour and the glyph drawn on the tile."""

    chinese: str
    color: Color
    glyph: str


APPS: dict[str, App] = {
    "Settings": App("设置", (110, 120, 130), "gear"),
    "Camera": App("相机", (60, 60, 70), "ring"),
    "Photos": App("相册", (240, 170, 60), "hills"),
    "Phone": App("电话", (60, 180, 90), "bar"),
    "Messages": App("短信", (60, 130, 240), "bubble"),
    "Contacts": App("通讯录", (150, 110, 80), "person"),
    "Calendar": App("日历", (230, 80, 70), "grid"),
    "Clock": App("时钟", (40, 50, 90), "hands"),
    "Weather": App("天气", (100, 190, 240), "sun"),
    "Maps": App("地图", (90, 190, 120), "pin"),
    "Music": App("音乐", (230, 70, 130), "note"),
    "Video": App("视频", (200, 40, 40), "play"),
    "Mail": App("邮件", (50, 110, 200), "envelope"),
    "Browser": App("浏览器", (70, 160, 220), "globe"),
    "Notes": App("备忘录", (245, 215, 90), "lines"),
    "Files": App("文件", (80, 140, 170), "folder"),
    "Calculator": App("计算器", (90, 90, 95), "plus"),
    "Store": App("应用商店", (40, 150, 160), "bag"),
    "Wallet": App("钱包", (120, 80, 180), "card"),
    "Health": App("健康", (245, 120, 150), "heart"),
    "Games": App("游戏", (130, 60, 220), "diamond"),
    "Books": App("图书", (220, 130, 50), "book"),
    "Taxi": App("打车", (250, 200, 40), "car"),
    "Shopping": App("购物", (250, 100, 40), "cart"),
}

SWITCH_ROWS: dict[str, str] = {
    "Wi-Fi": "无线网络",
    "Bluetooth": "蓝牙",
    "Location": "定位",
    "Hotspot": "热点",
    "Airplane mode": "飞行模式",
    "Dark mode": "深色模式",
    "Power saver": "省电模式",
    "Rotation": "自动旋转",
    "Vibration": "振动",
    "Mobile data": "移动数据",
}

PLAIN_ROWS: dict[str, str] = {
    "Storage": "存储",
    "Language": "语言",
    "Wallpaper": "壁纸",
    "Sound": "声音",
    "Fonts": "字体",
    "Updates": "系统更新",
    "Printing": "打印",
    "Account": "账号",
    "Backup": "备份",
    "About": "关于手机",
}

BUTTONS: dict[str, str] = {
    "OK": "确定",
    "Cancel": "取消",
    "Allow": "允许",
    "Deny": "拒绝",
    "Save": "保存",
    "Delete": "删除",
    "Send": "发送",
    "Share": "分享",
    "Next": "下一步",
    "Skip": "跳过",
    "Retry": "重试",
    "Submit": "提交",
}

FIELDS: dict[str, str] = {
    "Name": "姓名",
    "Email": "邮箱",
    "Password": "密码",
    "Address": "地址",
    "City": "城市",
    "Mobile": "手机号",
}

PEOPLE: dict[str, str] = {
    name: name
    for name in (
        "Alice",
        "Bob",
        "Carol",
        "David",
        "Emma",
        "Frank",
        "Grace",
        "Henry",
        "Irene",
        "Jack",
        "Kevin",
        "Linda",
    )
}

HEADER_ICONS: dict[str, str] = {"Search": "搜索", "More": "更多", "Add": "添加", "Help": "帮助"}

TITLES: dict[str, str] = {
    "Network": "网络",
    "Display": "显示",
    "Security": "安全",
    "Privacy": "隐私",
    "System": "系统",
    "General": "通用",
    "Profile": "个人资料",
    "Orders": "订单",
    "Feedback": "反馈",
    "Checkout": "结算",
    "Sign up": "注册",
    "Recent": "最近",
}

CHINESE: dict[str, str] = {
    **{label: app.chinese for label, app in APPS.items()},
    **SWITCH_ROWS,
    **PLAIN_ROWS,
    **BUTTONS,
    **FIELDS,
    **PEOPLE,
    **HEADER_ICONS,
    **TITLES,
}

LABELS: tuple[str, ...] = tuple(CHINESE)
"""All labels; the class of a label in the vision stage is its index here, one past the end is background."""
