@@head

_medplum_agent() {
    local current=${COMP_WORDS[COMP_CWORD]} at="" offer="" files='^(@@files)$' how i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            @@valued) ((i++)) ;;
            -*) ;;
            *) at+="${at:+ }${COMP_WORDS[i]}" ;;
        esac
    done
    [[ $current == -* ]] || case $at in
@@words
    esac
    [[ $offer ]] || case $at in
@@options
    esac
    how=(-W "$offer")
    [[ $current != -* && $at =~ $files ]] && how=(-f)
    case ${COMP_WORDS[COMP_CWORD - 1]} in
        @@file) how=(-f) ;;
        @@folder) how=(-d) ;;
@@choices
        @@free) return 0 ;;
    esac
    mapfile -t COMPREPLY < <(compgen "${how[@]}" -- "$current")
    [[ ${how[0]} == -W ]] || compopt -o filenames
}

complete -F _medplum_agent @@program
