# Left and right turn, space pauses, R resets, Tab asks for a prompt.
extends Control

var told := 0.0

@onready var view: CFEngineView = $View
@onready var prompt: LineEdit = $Prompt


func _ready() -> void:
	$Picture.texture = view.get_texture()
	prompt.text_submitted.connect(send_prompt)


func _process(_delta: float) -> void:
	var wanted := 0.0 if prompt.visible else Input.get_axis("ui_left", "ui_right")
	if wanted != told and view.turn(wanted) != 0:  # 0: not sent; the next picture tries again
		told = wanted


func _unhandled_key_input(event: InputEvent) -> void:
	if not event.is_pressed() or event.is_echo():
		return
	match event.keycode:
		KEY_SPACE:
			if view.get_state() == "paused":
				view.resume()
			else:
				view.pause()
		KEY_R:
			view.reset()
		KEY_TAB:
			prompt.visible = true
			prompt.grab_focus()
			get_viewport().set_input_as_handled()


func send_prompt(text: String) -> void:
	if text != "":
		view.push_prompt(text)
	prompt.clear()
	prompt.release_focus()
	prompt.visible = false
