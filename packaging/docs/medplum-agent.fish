@@head

function __medplum_agent_at --description 'Whether what stands there without options is this pattern'
    set -l at
    set -l skip no
    set -l given (commandline -opc)
    set -e given[1]
    for word in $given
        if test $skip = yes
            set skip no
        else if contains -- $word @@valued
            set skip yes
        else if not string match -q -- '-*' $word
            set -a at $word
        end
    end
    string match -q -- $argv[1] "$at"
end

complete -c @@program -f
@@words
@@options
